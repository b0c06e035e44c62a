"""What one forward pass reads besides weights and the pool, in device tensors of fixed size.

A CUDA graph replays launches with the pointers and grids they were captured with, so everything that differs from step
to step lies in one int32 tensor, filled by one copy from pinned memory: token ids, positions, slots, the segments and
the tiles they are cut into. Two kinds of segments: those of one token (**decodes**, whatever they are to the scheduler)
and longer ones, cut into **tiles**. Padding is a decode entry without a context, or a tile of no segment; a token of
padding has no slot. For kernels that want a segment's keys one after another, the slots of all of them are listed.
"""

# torch declares no types for streams and events.
# mypy: disallow-untyped-calls=False

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


def _aligned(size: int) -> int:
    """Fields begin at 64 bytes: a kernel is compiled anew for a pointer that is aligned otherwise."""
    return -(-size // 16) * 16


@dataclass(frozen=True, slots=True)
class Piece:
    """A segment: ``new`` tokens after ``total - new`` earlier ones, whose keys lie in ``pages``."""

    new: int
    total: int
    pages: Sequence[int]


class StepInputs:
    """Device tensors for at most ``tokens`` tokens in at most ``segments`` segments with ``pages`` pages together, and
    for a list of at most ``keys`` keys.

    Attributes, all int32 on the device (views, cut to what ``fill`` was told):
        count [1]: tokens that are not padding. ids [T], slots [T] (-1: none), visual [T] (1: the row stands for the
        embedding), positions [3, T]. pages [P]: page numbers, segment after segment.
        dec_token, dec_total, dec_pages [D]: token index (-1: none), length with the new token, first index in pages.
        seg_start, seg_new, seg_total, seg_pages [S], tile_segment (-1: none), tile_at [N]: the longer segments.
        key_slots [K]: if not empty, of all keys of the segments from the first longer one on, one after another, and
        slot 0 as padding; query_at, key_at [S + 1]: where each of these segments begins among the tokens and the keys,
        and where the last one ends, which is said again for segments that there are not.
        sampled [n]: tokens whose logits are wanted.
    """

    def __init__(
        self, *, tokens: int, segments: int, pages: int, page_size: int, tile_tokens: int, device: torch.device,
        keys: int = 0,
    ) -> None:  # fmt: skip
        self.capacity, self.segments, self.page_size, self.tile_tokens = tokens, segments, page_size, tile_tokens
        tiles = -(-tokens // tile_tokens) + segments
        sizes = {"count": 1, "ids": tokens, "slots": tokens, "visual": tokens}
        sizes |= dict.fromkeys(("position_t", "position_h", "position_w"), tokens)
        sizes |= dict.fromkeys(("dec_token", "dec_total", "dec_pages"), segments)
        sizes |= dict.fromkeys(("seg_start", "seg_new", "seg_total", "seg_pages"), segments)
        sizes |= {**dict.fromkeys(("tile_segment", "tile_at"), tiles), "sampled": segments}
        sizes |= {"query_at": segments + 1, "key_at": segments + 1}
        pinned = device.type == "cuda"
        with torch.inference_mode(False):  # written by whichever thread steps, in whatever mode
            self._staged = torch.zeros(sum(map(_aligned, sizes.values())), dtype=torch.int32, pin_memory=pinned)
            self._staged_pages, self._staged_keys = (
                torch.zeros(size, dtype=torch.int32, pin_memory=pinned) for size in (pages, keys)
            )
            self._all = torch.zeros(self._staged.shape, dtype=torch.int32, device=device)
            self.pages, self._key_slots = (
                torch.zeros(size, dtype=torch.int32, device=device) for size in (pages, keys)
            )
        self._host: dict[str, np.ndarray] = {}
        self._device: dict[str, torch.Tensor] = {}
        at = 0
        for name, size in sizes.items():
            self._host[name] = self._staged[at : at + size].numpy()
            self._device[name] = self._all[at : at + size]
            if name == "position_t":  # the first of three that lie together
                self._positions = self._all[at : at + 3 * _aligned(size)].view(3, -1)
            at += _aligned(size)
        self._copied = torch.cuda.Event() if pinned else None
        self.pieces: tuple[Piece, ...] = ()
        """The segments as the host knows them, padding left out."""
        self.tokens = self.decodes = self.tiles = 0
        self.cut(tokens, segments, tiles)

    @property
    def keys(self) -> int:
        """Keys that can be listed."""
        return self._key_slots.shape[0]

    def cut(self, tokens: int, decodes: int, tiles: int, keys: int = 0) -> None:
        """Sets the sizes of what kernels see: the views, and so their grids."""
        self.tokens, self.decodes, self.tiles = tokens, decodes, tiles
        d = self._device
        self.count, self.positions = d["count"], self._positions[:, :tokens]
        self.ids, self.slots, self.visual = d["ids"][:tokens], d["slots"][:tokens], d["visual"][:tokens]
        self.dec_token, self.dec_total, self.dec_pages = (
            d[name][:decodes] for name in ("dec_token", "dec_total", "dec_pages")
        )
        self.seg_start, self.seg_new, self.seg_total, self.seg_pages = (
            d[name] for name in ("seg_start", "seg_new", "seg_total", "seg_pages")
        )
        self.tile_segment, self.tile_at = d["tile_segment"][:tiles], d["tile_at"][:tiles]
        self.sampled, self.query_at, self.key_at = d["sampled"], d["query_at"], d["key_at"]
        self.key_slots = self._key_slots[:keys]

    def fits(self, pieces: Sequence[Piece]) -> bool:
        return (
            sum(p.new for p in pieces) <= self.capacity
            and len(pieces) <= self.segments
            and sum(-(-p.total // self.page_size) for p in pieces) <= self.pages.shape[0]
        )

    def fill(
        self,
        pieces: Sequence[Piece],
        ids: np.ndarray,
        positions: np.ndarray,
        *,
        visual: np.ndarray | None = None,
        sampled: Sequence[int] = (),
        pad_to: tuple[int, int, int] | None = None,
        keys: int = 0,
    ) -> None:
        """Stages a step and starts its copy, once the copy of the step before has ended.

        Args:
            ids [T], positions [3, T]: of the pieces' tokens, one piece after another.
            visual: token indices that a row stands for. sampled: token indices whose logits are wanted.
            pad_to: (tokens, decodes, tiles) that the kernels shall see; None: no padding.
            keys: as many are listed, padding included; 0: none are. See :func:`listed`.
        """
        if self._copied is not None:
            self._copied.synchronize()
        host, page = self._host, self.page_size
        tokens = len(ids)
        host["count"][0] = tokens
        width = pad_to[0] if pad_to else tokens
        host["ids"][:tokens], host["ids"][tokens:width] = ids, 0
        for name, row in zip(("position_t", "position_h", "position_w"), positions, strict=True):
            host[name][:tokens], host[name][tokens:width] = row, 0
        host["visual"][:width] = 0
        if visual is not None:
            host["visual"][visual] = 1
        host["slots"][tokens:width] = -1
        at = used = longer = tiles = 0
        ones: list[tuple[int, int, int, int]] = []  # of decodes: token, total, first page, slot
        staged = self._staged_pages.numpy()
        for piece in pieces:
            count = -(-piece.total // page)
            staged[used : used + count] = piece.pages[:count]
            if piece.new == 1:
                last = piece.total - 1
                ones.append((at, piece.total, used, piece.pages[last // page] * page + last % page))
            else:
                spots = np.arange(piece.total - piece.new, piece.total)
                host["slots"][at : at + piece.new] = staged[used + spots // page] * page + spots % page
                host["seg_start"][longer], host["seg_new"][longer] = at, piece.new
                host["seg_total"][longer], host["seg_pages"][longer] = piece.total, used
                cut = -(-piece.new // self.tile_tokens)
                host["tile_segment"][tiles : tiles + cut] = longer
                host["tile_at"][tiles : tiles + cut] = np.arange(cut) * self.tile_tokens
                longer, tiles = longer + 1, tiles + cut
            at, used = at + piece.new, used + count
        decodes = len(ones)
        if ones:
            at_token, totals, first_pages, slots = zip(*ones, strict=True)
            host["dec_token"][:decodes], host["dec_total"][:decodes] = at_token, totals
            host["dec_pages"][:decodes], host["slots"][list(at_token)] = first_pages, slots
        wanted = pad_to or (tokens, decodes, tiles)
        # A decode entry of padding answers for a token of padding, which then is zeros and not whatever was there.
        spare = np.arange(tokens, tokens + wanted[1] - decodes)
        host["dec_token"][decodes : wanted[1]] = np.where(spare < width, spare, -1)
        host["dec_total"][decodes : wanted[1]] = 0
        host["dec_pages"][decodes : wanted[1]] = 0
        host["tile_segment"][tiles : wanted[2]] = -1
        host["sampled"][: len(sampled)] = sampled
        self.pieces = tuple(pieces)
        if keys:
            self._list_keys(keys)
        self.cut(*wanted, keys)
        self.sampled = self.sampled[: len(sampled)]
        self._all.copy_(self._staged, non_blocking=True)
        self.pages[:used].copy_(self._staged_pages[:used], non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def _list_keys(self, room: int) -> None:
        """Stages and copies ``key_slots``, and stages the rest."""
        slots, page = self._staged_keys.numpy(), self.page_size
        query_at, key_at = self._host["query_at"], self._host["key_at"]
        first = _first_longer(self.pieces)
        query, key = sum(piece.new for piece in self.pieces[:first]), 0
        query_at[0], key_at[0], count = query, 0, 0
        for piece in self.pieces[first:]:
            pages = np.asarray(piece.pages[: -(-piece.total // page)], dtype=np.int32)
            its = (pages[:, None] * page + np.arange(page, dtype=np.int32)).reshape(-1)[: piece.total]
            slots[key : key + piece.total] = its
            query, key, count = query + piece.new, key + piece.total, count + 1
            query_at[count], key_at[count] = query, key
        query_at[count + 1 :], key_at[count + 1 :] = query, key
        slots[key:room] = 0
        self._key_slots[:room].copy_(self._staged_keys[:room], non_blocking=True)


def _first_longer(pieces: Sequence[Piece]) -> int:
    return next((i for i, piece in enumerate(pieces) if piece.new > 1), len(pieces))


def listed(pieces: Sequence[Piece]) -> int:
    """Keys of the segments from the first longer one on."""
    return sum(piece.total for piece in pieces[_first_longer(pieces) :])
