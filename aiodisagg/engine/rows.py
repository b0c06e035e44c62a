"""Item rows of requests, as they arrive, and how far each prompt is complete from its beginning.

A request's rows lie in one tensor ``[rows, (1+k)*h]`` in the order of the prompt, so the rows of a range of prompt
tokens are a slice. They are kept as long as the request lives: a preempted request is computed again from them, and
any request but the oldest may be preempted until its last token.

Rows may come in any order, in pieces of any size, from any thread, and more than once (after a failover); what is held
already is not written again. Rows of tokens whose keys and values are in shared pages need not come at all.
"""

from __future__ import annotations

import contextlib
import threading
from contextlib import AbstractContextManager

import numpy as np
import torch

from aiodisagg.device.copies import DeviceBytes, SideStream, address_of
from aiodisagg.errors import EngineError
from aiodisagg.models.base import PromptPlan

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class RequestRows:
    """The rows of one request.

    Args:
        plan: says which prompt tokens are rows of which item.
        width: elements of a row; None: the first delivery decides, any multiple of ``hidden_size``.
        dtype, device: of the tensor that keeps them, the model's.
        stream: copies to ``device``, beside what it computes. The tensor is allocated for this stream, so a copy needs
            not wait for computing that used its memory before; None: copies are ordinary ones.

    Raises EngineError if the plan contradicts itself (spans that do not hold the items' rows, placeholders outside of
    every span): such a prompt would get answers to something else.
    """

    def __init__(
        self,
        request_id: str,
        plan: PromptPlan,
        *,
        hidden_size: int,
        width: int | None,
        dtype: torch.dtype,
        device: torch.device,
        stream: SideStream | None = None,
    ) -> None:
        self.request_id, self._stream = request_id, stream
        self._tokens = plan.tokens
        self._hidden_size, self._width, self._dtype, self._device = hidden_size, width, dtype, device
        self._items = tuple(item.rows for item in plan.items)
        self._first = tuple(int(n) for n in np.cumsum((0, *self._items)))
        self._starts = np.array([start for item in plan.items for start, _ in item.spans], dtype=np.int64)
        self.visual = self._visual_tokens(plan)
        """int64 [rows]: prompt positions of the rows, ascending."""
        self._arrived = np.zeros(self._first[-1], dtype=bool)
        self._unneeded = 0  # rows from the first that nobody will take
        self._complete = 0  # rows held or not needed, without a gap from the first
        self._asked: set[int] = set()
        self._packed: torch.Tensor | None = None
        self._lock = threading.Lock()

    def _visual_tokens(self, plan: PromptPlan) -> np.ndarray:
        spans = [span for item in plan.items for span in item.spans]
        ends = [0, *(edge for span in spans for edge in span), plan.tokens]
        if ends != sorted(ends) or any(start == stop for start, stop in spans):
            raise EngineError(self.request_id, f"item spans {spans} are not ascending ranges of {plan.tokens} tokens")
        for i, item in enumerate(plan.items):
            held = sum(stop - start for start, stop in item.spans)
            if held != item.rows:
                raise EngineError(self.request_id, f"item {i} has {item.rows} rows for {held} placeholders")
        visual = np.concatenate([np.arange(0), *(np.arange(start, stop) for start, stop in spans)])
        outside = np.delete(plan.input_ids, visual)
        if np.isin(outside, np.unique(plan.input_ids[visual])).any():
            raise EngineError(self.request_id, "the prompt has placeholders that belong to no item")
        return visual

    @property
    def front(self) -> int:
        """Prompt tokens that can be computed, or need not be: all before the image or frame pair whose row is missing.

        A tower makes these rows at once, so the rest of a span is on its way when its first rows are here; computing it
        in pieces would read the weights once for each.
        """
        complete = self._complete
        if complete == len(self.visual):
            return self._tokens
        return int(self._starts[np.searchsorted(self._starts, self.visual[complete], side="right") - 1])

    @property
    def stops(self) -> list[int]:
        """Where :attr:`front` can stand before all rows are here, ascending."""
        return [int(start) for start in self._starts]

    def reuse(self, tokens: int) -> None:
        """Rows of the first ``tokens`` prompt tokens are not needed; replaces what was said before."""
        with self._lock:
            self._unneeded = self._complete = int(np.searchsorted(self.visual, tokens))
            self._count()

    def ask(self) -> tuple[int, ...]:
        """Items with rows that are needed and not here; each is named once in the life of the request."""
        with self._lock:
            missing = np.flatnonzero(~self._arrived[self._complete :]) + self._complete
            found = np.unique(np.searchsorted(self._first, missing, side="right") - 1).tolist()
            new = tuple(i for i in found if i not in self._asked)
            self._asked.update(new)
            return new

    @property
    def size_bytes(self) -> int:
        packed = self._packed
        return 0 if packed is None else packed.numel() * packed.element_size()

    def write(self, item: int, start: int, rows: torch.Tensor) -> None:
        """Copies ``rows`` [n, width] of ``item`` from its row ``start`` on; they can be reused on return.

        Raises EngineError if they are not rows of this item in the model's dtype.
        """
        if rows.ndim != 2 or rows.dtype != self._dtype:
            raise self._error(
                item, f"rows of shape {tuple(rows.shape)}, {rows.dtype}; wanted [n, width], {self._dtype}"
            )
        packed, at = self._reserve(item, start, rows.shape[0], rows.shape[1])
        if not self._arrived[at : at + rows.shape[0]].all():
            with torch.no_grad():
                packed[at : at + rows.shape[0]].copy_(rows.detach())
            self._settle()
            self._mark(at, at + rows.shape[0])

    def write_bytes(
        self, item: int, start: int, data: bytes | bytearray | memoryview | DeviceBytes, *, width: int, dtype: str
    ) -> None:
        """As :meth:`write`, from the raw little-endian bytes of packed rows, ``dtype`` named as in a RowLayout.

        Rows of another dtype than the model's are cast: a bfloat16 tower may feed a float32 language half. With a
        ``stream`` this blocks its thread until the copy's event has come; DeviceBytes need one.
        """
        kind = _DTYPES.get(dtype)
        row_bytes = width * kind.itemsize if kind is not None else 0
        size = data.size_bytes if isinstance(data, DeviceBytes) else memoryview(data).nbytes
        if kind is None or not row_bytes or size % row_bytes:
            raise self._error(item, f"{size} bytes of {dtype} are not rows of {width} elements")
        count = size // row_bytes
        packed, at = self._reserve(item, start, count, width)
        if not self._arrived[at : at + count].all():
            target = packed[at : at + count]
            if self._stream is not None:
                self._upload(self._stream, target, data, kind)
            elif isinstance(data, DeviceBytes):
                raise self._error(item, "device memory cannot be read without a stream")
            else:
                self._copy_in(target, data, kind)
                self._settle()
            self._mark(at, at + count)

    def _copy_in(self, target: torch.Tensor, data: bytes | bytearray | memoryview, kind: torch.dtype) -> None:
        cast = kind is not self._dtype or self._device.type != "cpu"
        raw = torch.empty(target.shape, dtype=kind) if cast else target
        # Not torch.frombuffer: it warns of read-only bytes, and filtering warnings is not for threads.
        np.copyto(raw.view(torch.uint8).numpy().reshape(-1), np.frombuffer(data, dtype=np.uint8))
        if cast:
            with torch.no_grad():
                target.copy_(raw)

    def _settle(self) -> None:
        """Waits until this thread's copies are done: the engine reads them on a stream of its own."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _upload(
        self, stream: SideStream, target: torch.Tensor, data: bytes | bytearray | memoryview | DeviceBytes,
        kind: torch.dtype,
    ) -> None:  # fmt: skip
        with self._on(stream), torch.no_grad():
            landed = target if kind is self._dtype else torch.empty_like(target, dtype=kind)
            source = data.address if isinstance(data, DeviceBytes) else address_of(memoryview(data))
            stream.copy(landed.data_ptr(), source, landed.nbytes)
            if landed is not target:
                target.copy_(landed)
                stream.wait()

    def _on(self, stream: SideStream) -> AbstractContextManager[object]:
        """Makes torch allocate and compute on the stream, in this thread."""
        if self._device.type != "cuda":
            return contextlib.nullcontext()
        # torch declares no types for ExternalStream
        return torch.cuda.stream(torch.cuda.ExternalStream(stream.handle, self._device))  # type: ignore[no-untyped-call]

    def take(self, start: int, stop: int) -> tuple[np.ndarray, torch.Tensor | None]:
        """Rows among the prompt tokens ``[start, stop)``, which must lie before ``front``.

        Returns their positions relative to ``start``, int64 [n], and a view of the rows [n, width], None if n is 0.
        """
        if start >= self._tokens:
            return self.visual[:0], None
        first, last = (int(n) for n in np.searchsorted(self.visual, (start, stop)))
        if first == last:
            return self.visual[:0], None
        if first < self._unneeded or last > self._complete or self._packed is None:
            here = f"[{self._unneeded}, {self._complete})"
            raise EngineError(self.request_id, f"rows [{first}, {last}) are wanted, {here} are here")
        if self._packed.is_cuda:  # its memory is another stream's, but used here too
            self._packed.record_stream(torch.cuda.current_stream(self._device))
        return self.visual[first:last] - start, self._packed[first:last]

    def _error(self, item: int, message: str) -> EngineError:
        return EngineError(self.request_id, f"item {item}: {message}")

    def _reserve(self, item: int, start: int, count: int, width: int) -> tuple[torch.Tensor, int]:
        """The tensor and the index of the first row in it."""
        if not 0 <= item < len(self._items):
            raise self._error(item, f"the request has {len(self._items)} items")
        if start < 0 or start + count > self._items[item]:
            raise self._error(item, f"rows [{start}, {start + count}) of {self._items[item]}")
        with self._lock:
            wanted = self._width
            if (wanted is not None and width != wanted) or width < self._hidden_size or width % self._hidden_size:
                raise self._error(item, f"rows of {width} elements, wanted {wanted or f'n * {self._hidden_size}'}")
            if self._packed is None:
                self._width = width
                place = contextlib.nullcontext() if self._stream is None else self._on(self._stream)
                with torch.inference_mode(False), place:  # another thread, in another mode, may write the next rows
                    self._packed = torch.empty((len(self.visual), width), dtype=self._dtype, device=self._device)
            return self._packed, self._first[item] + start

    def _mark(self, start: int, stop: int) -> None:
        with self._lock:
            self._arrived[start:stop] = True
            self._count()

    def _count(self) -> None:
        rest = self._arrived[self._complete :]
        self._complete += len(rest) if rest.all() else int(rest.argmin())
