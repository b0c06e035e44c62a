"""Encode/language disaggregation for vision-language models on asyncio."""

__version__ = "0.1.0"
