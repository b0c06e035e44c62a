"""BothService: an encode peer and a language peer that are one."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TYPE_CHECKING

from aiodisagg.encode.core import CoreGate
from aiodisagg.encode.device import DeviceGate
from aiodisagg.encode.gate import InlineGate, SlackGate
from aiodisagg.encode.service import EncodeService
from aiodisagg.engine.types import Delta, SamplingParams
from aiodisagg.errors import EngineError, own_error
from aiodisagg.language.admission import DEFAULT_TENANT
from aiodisagg.language.membership import LocalEncoder
from aiodisagg.language.service import LanguageService
from aiodisagg.link.hello import PeerRole
from aiodisagg.models.base import ChatMessage, Planner, VisionEncoder
from aiodisagg.peer import metrics
from aiodisagg.peer.config import EncodeConfig, LanguageConfig, check
from aiodisagg.peer.once import EnteredOnce
from aiodisagg.scheduler.shares import Tenant
from aiodisagg.scheduler.slack import SHARE_OF_ONE_DEVICE, Slack

if TYPE_CHECKING:
    from aiodisagg.models.language import LanguageHalf
    from aiodisagg.protocol.rows import ModelFingerprint

_PACE_S = 0.05
"""Where prefill is not bounded either."""


class BothService(EnteredOnce):
    """Answers chats, encoding their images itself or on other peers, whoever is done first; and encodes for others.

    The halves are the two services as they are, joined by a link and a data plane inside the process; the encode half
    is one candidate among the encode peers. The peer registers once, as ``both``. What it does is a matter of what
    waits in its queues: the tower works at full speed while no stream decodes; what bounds it beside streams, on an
    accelerator, on a CPU, or on devices of their own, is told in docs/both.md.

    ::

        language = LanguageConfig(model=folder, bootstrap=("http://127.0.0.1:8500",))
        async with BothService(language, EncodeConfig(model=folder)) as peer:
            async for delta in peer.generate(messages, SamplingParams(max_tokens=64)):
                print(delta.text, end="")

    Args:
        language: also says where the peer registers. encode: its ``bootstrap`` is not used.
        inter_token_s: pace that running streams are owed while the tower works, see
            :class:`~aiodisagg.scheduler.slack.Slack`. None: what bounds prefill, ``language.pace_ms``; but on a
            CPU the operating system shares cores out (:mod:`aiodisagg.encode.core`).
        inline: the tower is part of the engine's loop: no step while it works, and no prefill before a prompt's last
            image. What replicas without any of this do; it is there to be compared with.
        encoder: instead of the checkpoint's vision tower. loaded: as for LanguageService.
    """

    def __init__(
        self, language: LanguageConfig, encode: EncodeConfig, *, inter_token_s: float | None = None,
        inline: bool = False, encoder: VisionEncoder | None = None,
        loaded: tuple[Planner, LanguageHalf, ModelFingerprint] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._loaded = loaded
        if inter_token_s is not None:
            check("inter_token_s", inter_token_s)
        name = language.name or encode.name or f"both-{encode.incarnation[:6]}"  # by name the halves are one
        of_language, of_encode = (_nearest(half.transports, encode.device) for half in (language, encode))
        overlap = language.overlap and not inline
        self._language = dataclasses.replace(language, name=name, transports=of_language, overlap=overlap)
        encode = dataclasses.replace(encode, name=name, bootstrap=(), transports=of_encode)
        self.name, self.model_names = name, language.model_names
        self.model_name = self.model_names[0]
        self.gate: InlineGate | CoreGate | SlackGate
        if inline:
            self.gate = InlineGate()
        elif inter_token_s is None and language.device == encode.device == "cpu":
            self.gate = CoreGate()
        else:
            pace_s = inter_token_s or language.pace_ms / 1e3 or _PACE_S
            same_device = _number(language.device) == _number(encode.device) and encode.device != "cpu"
            of_one = Slack(pace_s, share=SHARE_OF_ONE_DEVICE)
            self.gate = DeviceGate(of_one) if same_device else SlackGate(Slack(pace_s))
        self.encode = EncodeService(encode, encoder=encoder, gate=self.gate, role=PeerRole.BOTH)

    async def _open(self) -> None:
        half = await self._stack.enter_async_context(self.encode)
        local = LocalEncoder(half.record(), half.load)
        language = LanguageService(self._language, loaded=self._loaded, local=local, watcher=self.gate)
        self.language = await self._stack.enter_async_context(language)

    @property
    def address(self) -> str:
        """Where other language peers link to this one."""
        return self.encode.address

    @property
    def created(self) -> int:
        return self.language.created

    def add_peer(self, address: str) -> None:
        """Keeps a link to another peer that encodes; what the bootstrap server's membership does by itself."""
        self.language.add_peer(address)

    def generate(
        self,
        messages: Sequence[ChatMessage],
        sampling: SamplingParams,
        *,
        request_id: str | None = None,
        timeout_s: float | None = None,
        tenant: Tenant = DEFAULT_TENANT,
        priority: int = 0,
    ) -> AsyncGenerator[Delta, None]:
        """As ``LanguageService.generate``."""
        if why := self._why_not:
            raise EngineError(request_id or self.name, f"the service is {why}")
        return self.language.generate(
            messages, sampling, request_id=request_id, timeout_s=timeout_s, tenant=tenant, priority=priority
        )

    @property
    def broken(self) -> str:
        """Why one of the halves will do nothing any more, or empty."""
        return "" if not self._opened else self.encode.broken or self.language.broken

    def ready(self) -> tuple[bool, str]:
        """Can requests be served now, by both halves, and if not, why."""
        if not self._is_open:
            return False, "not open"
        ready, why = self.encode.ready()  # whose end the other would tell as one of a link
        return self.language.ready() if ready else (ready, why)

    def metrics(self) -> str:
        """Everything both halves count; what both call the same begins with ``aiodisagg_encode_`` for the tower's."""
        if not self._opened:
            return ""
        gate = [
            metrics.counter("tower_waits", "Batches of the tower that waited for running answers.", self.gate.waits),
            metrics.counter("tower_waited_seconds", "Time that those batches waited.", self.gate.waited_s),
        ]
        halves = metrics.beside(self.language.families(), self.encode.families(), "encode")
        return metrics.render([*halves, *gate])

    def debug(self) -> dict[str, Callable[[], object]]:
        """As ``LanguageService.debug``."""
        return self.language.debug()

    async def drain(self) -> None:
        """Finishes the open requests, which may still need the own tower, then what others asked for."""
        await self.language.drain()
        await self.encode.drain()

    async def serve(self) -> None:
        """Returns when the context is left. Raises PeerBroken when one of the halves will compute nothing any more."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.language.serve())
                group.create_task(self.encode.serve())
        except ExceptionGroup as failed:
            raise own_error(failed) from None


def _number(device: str) -> str:
    """``cuda`` is ``cuda:0``."""
    return device if ":" in device else f"{device}:0"


def _nearest(transports: tuple[str, ...], device: str) -> tuple[str, ...]:
    """Inside the process rows need no detour, but those of an accelerator do: they are copied straight into a pool that
    is mapped, and ``memory`` maps none."""
    others = tuple(name for name in transports if name != "memory")
    return ("memory", *others) if device == "cpu" else others
