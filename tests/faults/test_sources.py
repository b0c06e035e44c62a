"""What an encode peer keeps: rows for a receiver that may come back, and a cache for whoever wants the same item."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiodisagg.bench.synthetic import item_of
from aiodisagg.language.rows import RowReceiver
from aiodisagg.link.hello import Hello, PeerRole
from aiodisagg.link.link import dial
from aiodisagg.peer.config import LanguageConfig
from aiodisagg.protocol.messages import ItemKey, Offer, Want

from .pair import MODEL, PATIENCE_S, ROW_BYTES, pair

pytestmark = pytest.mark.anyio


async def test_the_same_item_is_encoded_once(tmp_path: Path, no_leaks: None) -> None:
    """Repeated images, of one request or of many, and of a receiver that was restarted, come from the cache."""
    async with pair(tmp_path, "memory") as made:
        peer = made.encoders[0]
        await made.fetch([(7, 9), (7, 9), (8, 4)])
        assert (peer.sender.sources.started, peer.sender.sources.hits, peer.pipeline.items_encoded) == (2, 1, 2)
        await made.fetch([(7, 9)])
        assert (peer.sender.sources.started, peer.sender.sources.hits) == (2, 2)
        config = LanguageConfig(model=tmp_path, transports=("memory",), pool_bytes=6 * ROW_BYTES, block_rows=2)
        async with RowReceiver(config, MODEL, name="again", deliver=made.deliver, ended=made.ended) as again:
            again.peers.add(peer.address)
            await again.peers.wait_any(PATIENCE_S)
            made.receiver, before = again, made.receiver
            await made.fetch([(7, 9), (8, 4)])
            made.receiver = before
        assert (peer.sender.sources.started, peer.sender.sources.hits, peer.pipeline.items_encoded) == (2, 4, 2)


@pytest.mark.parametrize("retain_s", [0.2, 600.0])
async def test_rows_are_kept_until_a_lease_ends_or_others_need_the_room(
    tmp_path: Path, no_leaks: None, retain_s: float
) -> None:
    """A receiver that never comes back costs memory until its lease ends, and nobody else waits for that."""
    async with pair(tmp_path, "memory", retain_s=retain_s, source_bytes=9 * ROW_BYTES) as made:
        sender, spec = made.encoders[0].sender, item_of(1, 9)
        hello = Hello.here(name="lost", incarnation="lost", role=PeerRole.LANGUAGE, model=MODEL)
        link = await dial(made.addresses[0], hello)
        key = ItemKey(99, 0)
        grid, media = spec.grid_thw, spec.media
        await link.send(Want(key, 1, spec.digest, spec.kind, grid, 9, 0.0, (), (), MODEL, PATIENCE_S, media))
        assert isinstance(await link.recv(), Offer)
        link.abort()
        await link.wait_closed()
        await made.until(lambda: ("lost", key) not in sender.items or not sender.items["lost", key].linked)
        assert sender.sources.used_bytes == 9 * ROW_BYTES
        if retain_s < PATIENCE_S:
            await made.until(lambda: ("lost", key) not in sender.items)
        await made.fetch([(2, 9)])
        assert ("lost", key) not in sender.items
        assert sender.sources.get(spec.digest) is None


async def test_a_receiver_that_is_back_in_time_finds_its_rows(tmp_path: Path, no_leaks: None) -> None:
    """The link was away, the rows are still there: nothing is encoded again, and the media need not be sent again."""
    async with pair(tmp_path, "memory") as made:
        spec, key = item_of(1, 9), ItemKey(99, 0)
        hello = Hello.here(name="lost", incarnation="lost", role=PeerRole.LANGUAGE, model=MODEL)
        for epoch, media in ((1, spec.media), (2, None)):
            link = await dial(made.addresses[0], hello)
            grid = spec.grid_thw
            await link.send(Want(key, epoch, spec.digest, spec.kind, grid, 9, 0.0, (), (), MODEL, PATIENCE_S, media))
            while not isinstance(offer := await link.recv(), Offer) or offer.epoch != epoch:
                pass
            assert not offer.needs_media
            await made.until(lambda: made.encoders[0].pipeline.items_encoded == 1)
            link.abort()
            await link.wait_closed()
