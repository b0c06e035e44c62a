"""OpenAI-compatible HTTP in front of anything that answers chats (:class:`ChatBackend`)."""

from aiodisagg.api.backend import ChatBackend
from aiodisagg.api.config import ApiKey, HttpConfig, read_keys
from aiodisagg.api.server import HttpServer

__all__ = ["ApiKey", "ChatBackend", "HttpConfig", "HttpServer", "read_keys"]
