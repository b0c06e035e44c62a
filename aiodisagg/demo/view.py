"""What the demo shows: live progress of peers and requests, then a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

SHOWN = 14
MOVED_SHOWN = 5


class Row(msgspec.Struct):
    """One request of the table and of the JSON file. Times in milliseconds; -1: did not happen."""

    request: int
    group: str
    images: int
    answer: str
    truth: str | None
    monolith: str | None
    right: bool | None
    equal_to_monolith: bool | None
    error: str
    rows: int
    bytes_on_wire: int
    encode_ms: float
    transfer_ms: float
    first_token_ms: float
    total_ms: float
    moves: int = 0
    rows_kept: int = 0


def row_of(number: int, ask: Any, answer: str, error: str, trace: dict[str, Any] | None, monolith: str | None) -> Row:
    """Joins what the client saw, what the language peer traced and what the monolith says."""
    items = trace["items"] if trace else []
    started = min((item["asked_s"] for item in items), default=-1.0)
    encoded = max((item["encoded_s"] for item in items), default=-1.0)
    complete = max((item["complete_s"] for item in items), default=-1.0)
    return Row(
        request=number,
        group=ask.group,
        images=len(ask.images),
        answer=answer,
        truth=ask.truth,
        monolith=monolith,
        right=None if ask.truth is None else answer.strip() == ask.truth,
        equal_to_monolith=None if monolith is None else answer == monolith,
        error=error,
        rows=sum(item["rows"] for item in items),
        bytes_on_wire=sum(item["bytes_arrived"] for item in items),
        encode_ms=_span(started, encoded),
        transfer_ms=_span(encoded, complete),
        first_token_ms=_span(0.0, trace["first_token_s"] if trace else -1.0),
        total_ms=_span(0.0, trace["total_s"] if trace else -1.0),
        moves=sum(1 for item in items if item["moves"]),
        rows_kept=sum(item["rows_kept"] for item in items),
    )


def _span(start_s: float, stop_s: float) -> float:
    return round(1000 * (stop_s - start_s), 1) if start_s >= 0 and stop_s >= 0 else -1.0


def progress(members: Sequence[str], traces: Sequence[dict[str, Any]], done: int, total: int) -> RenderableType:
    """The live view: who runs, and how far each open request is."""
    head = Text.assemble(("peers  ", "bold"), ", ".join(members))
    table = Table(title=f"{done} of {total} requests answered", title_justify="left", expand=False)
    for column in ("request", "state", "items", "rows here", "tokens", "where"):
        table.add_column(column)
    for trace in traces[:SHOWN]:
        items = trace["items"]
        rows, here = sum(i["rows"] for i in items), sum(i["rows_arrived"] for i in items)
        moved = [i for i in items if i["moves"]]
        where = ", ".join(sorted({i["peers"][-1] for i in items if i["peers"]}))
        if moved:
            where += f"  moved {len(moved)}, kept {sum(i['rows_kept'] for i in moved)} rows"
        stages = " ".join(item["stage"] for item in items)
        table.add_row(
            trace["request_id"], trace["state"], stages, f"{_bar(here, rows)} {here}/{rows}",
            str(trace["output_tokens"]), where,
        )  # fmt: skip
    return Group(head, table)


def _bar(part: int, whole: int) -> str:
    full = 12 * part // whole if whole else 0
    return "█" * full + "░" * (12 - full)


def table(rows: Sequence[Row]) -> Table:
    """The final table."""
    found = Table(title="Requests (times in milliseconds)", title_justify="left", padding=(0, 1, 0, 0))
    for column in ("#", "img", "answer", "truth", "=mono"):
        found.add_column(column, no_wrap=column != "answer")
    for column in ("rows", "bytes", "encode", "move", "ttft", "total"):
        found.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        colour = "red" if row.error or row.right is False else ""
        found.add_row(
            str(row.request), str(row.images), Text(row.error or row.answer, style=colour), row.truth or "-",
            {None: "-", True: "yes", False: "NO"}[row.equal_to_monolith], str(row.rows), f"{row.bytes_on_wire:,}",
            f"{row.encode_ms:.0f}", f"{row.transfer_ms:.1f}", f"{row.first_token_ms:.0f}", f"{row.total_ms:.0f}",
        )  # fmt: skip
    return found


class Moved(msgspec.Struct):
    """An item that went from one encode peer to another; ``left`` is who had it before the last move."""

    request_id: str
    item: int
    left: str
    to: str
    rows: int
    rows_kept: int
    complete: bool


def moved_items(traces: Iterable[dict[str, Any]]) -> list[Moved]:
    """Those with the most rows kept first."""
    found = []
    for trace in traces:
        for i, item in enumerate(trace["items"]):
            if item["moves"]:
                left, to = item["peers"][-2:]
                complete = item["complete_s"] >= 0
                found.append(Moved(trace["request_id"], i, left, to, item["rows"], item["rows_kept"], complete))
    return sorted(found, key=lambda moved: -moved.rows_kept)


def what_moved(killed: str, moved: Sequence[Moved]) -> list[str]:
    """Lines for a person: some items that moved, then all of them in one sentence."""
    lines = [
        f"{one.request_id} image {one.item + 1}: stopped at {one.rows_kept} of {one.rows} rows on {one.left}, "
        f"went on with {one.rows - one.rows_kept} on {one.to}" + ("" if one.complete else ", not complete")
        for one in moved[:MOVED_SHOWN]
    ]
    to = ", ".join(sorted({one.to for one in moved})) or "nobody"
    kept, rows = sum(one.rows_kept for one in moved), sum(one.rows for one in moved)
    return [*lines, f"{killed} was killed: {len(moved)} items moved to {to}; {kept} of their {rows} rows were kept"]
