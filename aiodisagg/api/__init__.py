"""OpenAI-compatible HTTP in front of anything that answers chats (:class:`ChatBackend`)."""

from aiodisagg.api.backend import ChatBackend
from aiodisagg.api.config import HttpConfig
from aiodisagg.api.server import HttpServer

__all__ = ["ChatBackend", "HttpConfig", "HttpServer"]
