"""EncodeService as one language peer links to it: to dial anew is to give a link up only once something is said."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch

from aiodisagg.bench.synthetic import SyntheticEncoder, item_of, synthetic_model
from aiodisagg.encode.service import EncodeService
from aiodisagg.errors import ConfigError, LinkClosed
from aiodisagg.link import Hello, Link, LinkConfig, PeerRole, dial, framing
from aiodisagg.models.base import Patches
from aiodisagg.peer.config import EncodeConfig
from aiodisagg.protocol.events import LinkLost, LinkUp
from aiodisagg.protocol.messages import ItemKey, Offer, Progress, Want
from aiodisagg.protocol.rows import ModelFingerprint
from aiodisagg.scheduler.advertise import PREFIX
from tests.conftest import LOOPS
from tests.link.helpers import RawPeer

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]
MODEL = synthetic_model(hidden_size=16, levels=3)


@pytest.fixture(params=LOOPS)
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return request.param  # type: ignore[no-any-return]


class Serving:
    """An encode peer, what its machine is told of links, and a language peer that dials as often as it likes."""

    def __init__(self, service: EncodeService) -> None:
        self.service, self._address, self._items = service, service.address, 0
        self.hello = Hello.here(name="language", incarnation="l", role=PeerRole.LANGUAGE, model=MODEL)
        self.events: asyncio.Queue[LinkUp | LinkLost] = asyncio.Queue()
        feed = service.driver.feed

        def fed(event: object) -> None:
            if isinstance(event, LinkUp | LinkLost):
                self.events.put_nowait(event)
            feed(event)  # type: ignore[arg-type]

        service.driver.feed = fed  # type: ignore[method-assign]

    async def dial(self) -> Link:
        return await dial(self._address, self.hello)

    async def ask(self, link: Link) -> None:
        """Returns when a new item was answered through this link."""
        self._items += 1
        key, spec = ItemKey(self._items, 0), item_of(self._items, 4)
        await link.send(
            Want(key, 1, spec.digest, spec.kind, spec.grid_thw, spec.rows, spec.fps, (), (), MODEL, 60.0, spec.media)
        )
        while not (isinstance(answer := await link.recv(), Offer) and answer.key == key):
            pass


class Held(SyntheticEncoder):
    """Encodes once its gate is open."""

    def __init__(self, model: ModelFingerprint) -> None:
        super().__init__(model)
        self.gate = threading.Event()

    def encode(self, batch: Sequence[Patches]) -> list[torch.Tensor]:
        assert self.gate.wait(60)
        return super().encode(batch)


@asynccontextmanager
async def serving(
    folder: Path, encoder: SyntheticEncoder | None = None, *, link: LinkConfig | None = None
) -> AsyncIterator[Serving]:
    config = EncodeConfig(
        model=folder, name="encode", transports=("memory",), self_test_s=0.0, link=link or LinkConfig()
    )  # fmt: skip
    async with EncodeService(config, encoder=encoder or SyntheticEncoder(MODEL)) as service, asyncio.timeout(60):
        yield Serving(service)


async def test_where_it_cannot_listen_the_setting_is_named(tmp_path: Path) -> None:
    """It was called ``address``, which no peer's setting is."""
    with pytest.raises(ConfigError, match=r"^listen: 'nowhere' is none of unix:@name"):
        EncodeConfig(model=tmp_path, listen="nowhere")
    config = EncodeConfig(model=tmp_path, listen=f"unix:{tmp_path}/nowhere/a", transports=("memory",), self_test_s=0.0)
    with pytest.raises(ConfigError, match=r"^listen: cannot listen on unix:.*: No such file"):
        async with EncodeService(config, encoder=SyntheticEncoder(MODEL)):
            pass


async def test_it_is_entered_once(tmp_path: Path) -> None:
    config = EncodeConfig(model=tmp_path, transports=("memory",), self_test_s=0.0)
    service = EncodeService(config, encoder=SyntheticEncoder(MODEL))
    async with service:
        with pytest.raises(RuntimeError, match="EncodeService is entered once"):
            await service.__aenter__()
    with pytest.raises(RuntimeError, match="EncodeService is entered once"):
        await service.__aenter__()


async def test_a_second_link_that_is_closed_without_a_word_does_not_cut_the_first(tmp_path: Path) -> None:
    async with serving(tmp_path) as made:
        first = await made.dial()
        await made.ask(first)
        for _ in range(3):
            await (await made.dial()).aclose()
        await made.ask(first)
        assert [made.events.get_nowait(), made.events.empty()] == [LinkUp("l"), True]
        await first.aclose()


async def test_a_peer_that_speaks_through_a_second_link_gave_the_first_up(tmp_path: Path) -> None:
    async with serving(tmp_path) as made:
        first, second = await made.dial(), await made.dial()
        await made.ask(first)
        await made.ask(second)
        with pytest.raises(LinkClosed):
            while True:
                await first.recv()
        await made.ask(second)
        assert [made.events.get_nowait() for _ in range(3)] == [LinkUp("l"), LinkLost("l"), LinkUp("l")]
        await second.aclose()


async def test_a_heartbeat_tells_of_rows_that_exist_and_of_none_that_are_to_be_made(tmp_path: Path) -> None:
    """Who had but queued an item was asked for it by others, too, as if its rows were there, behind all that it had."""
    encoder = Held(MODEL)
    async with serving(tmp_path, encoder) as made:
        link, service = await made.dial(), made.service
        for _ in range(3):
            await made.ask(link)
        assert service.load().patches > 0 and service.load().digests == ()
        encoder.gate.set()
        while not isinstance(said := await link.recv(), Progress) or said.stage != "encoded":
            pass
        assert item_of(said.key.room, 4).digest[:PREFIX] in service.load().digests
        await link.aclose()


async def test_a_second_link_is_used_when_the_first_ends(tmp_path: Path) -> None:
    async with serving(tmp_path) as made:
        first, second = await made.dial(), await made.dial()
        assert await made.events.get() == LinkUp("l")
        await first.aclose()
        assert [await made.events.get(), await made.events.get()] == [LinkLost("l"), LinkUp("l")]
        await made.ask(second)
        await second.aclose()


async def test_a_peer_has_two_links_at_most(tmp_path: Path) -> None:
    """Any number of them could lie there, each with a frame that had come in part."""
    async with serving(tmp_path) as made:
        first = await made.dial()
        await made.ask(first)
        second, *further = [await made.dial() for _ in range(4)]
        for link in further:
            await link.wait_closed()
        await made.ask(first)
        assert not second.closed, "it may be what the peer goes on with: one more address of this one is dialled, too"
        await first.aclose()
        await made.ask(second)
        await second.aclose()


async def test_a_further_link_that_is_quiet_makes_way_for_the_next(tmp_path: Path) -> None:
    config = LinkConfig(heartbeat_s=0.05, timeout_s=60.0)
    async with serving(tmp_path, link=config) as made:
        first = await made.dial()
        await made.ask(first)
        assert made.service._server is not None
        dead = await RawPeer.connect(made.service._server)
        await dead.shake_hands(secret=None, said=made.hello)
        for _ in range(2):
            await dead.until(framing.PING)
        third = await made.dial()
        await dead.end()
        await first.aclose()
        await made.ask(third)
        await third.aclose()
        await dead.aclose()
