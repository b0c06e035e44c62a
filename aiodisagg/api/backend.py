"""What the HTTP edge needs of whoever answers chats; the language service is one, tests bring another."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from aiodisagg.engine.types import Delta, SamplingParams
from aiodisagg.models.base import ChatMessage
from aiodisagg.scheduler.shares import Tenant


class ChatBackend(Protocol):
    """Answers chats. All methods are called on the server's event loop; any number of answers runs at once."""

    @property
    def model_names(self) -> Sequence[str]:
        """What clients may ask for as ``model``; answers have the first. Always the same."""

    @property
    def created(self) -> int:
        """When the model was loaded, seconds since the epoch."""

    def generate(
        self,
        messages: Sequence[ChatMessage],
        sampling: SamplingParams,
        *,
        request_id: str,
        timeout_s: float | None = None,
        tenant: Tenant,
        priority: int = 0,
    ) -> AsyncGenerator[Delta, None]:
        """Streams an answer; the last delta carries ``finish_reason`` and ``usage``.

        ``request_id`` is unique among unfinished calls. ``tenant`` and ``priority`` say whose turn it is when there is
        more to do than can be done. The caller closes the generator; ``aclose`` (and cancellation
        inside ``anext``) stops the work everywhere before it returns.

        Raises InvalidRequest (MediaError, PromptTooLong), Overloaded, DeadlineExceeded after ``timeout_s``,
        EncodeFailed, NoEncodePeer, EngineError.
        """

    @property
    def broken(self) -> str:
        """Why nothing will be answered any more, whatever is asked, so that the process should be started anew; or
        empty."""

    def ready(self) -> tuple[bool, str]:
        """Whether requests can be answered now, and why not."""

    def metrics(self) -> str:
        """Metrics in Prometheus' text format. Does not block."""
