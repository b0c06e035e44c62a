"""Both tables of states and events as docs/states.md: ``python -m tests.protocol.states > docs/states.md``."""

from __future__ import annotations

from aiodisagg.protocol.events import State
from aiodisagg.protocol.incoming import IncomingItem
from aiodisagg.protocol.outgoing import OutgoingItem

_HEAD = """# States and events

For whoever changes the protocol, or reads an `InvalidTransition` in a log.

Generated from the tables in `aiodisagg/protocol/incoming.py` and `aiodisagg/protocol/outgoing.py` by
`python -m tests.protocol.states > docs/states.md`; a test compares. A cell names the method that handles the event
in that state; an empty one raises `InvalidTransition` and changes nothing. `ignore`: legal, without any effect.
"""


def events(machine: type) -> list[type]:
    """Every event the machine knows, in the order of its table."""
    return list(dict.fromkeys(event for _, event in machine.TABLE))  # type: ignore[attr-defined]


def table(machine: type) -> str:
    states = list(State)
    lines = ["| event | " + " | ".join(state.value for state in states) + " |", "|---" * (len(states) + 1) + "|"]
    for event in sorted(events(machine), key=lambda event: event.__name__):
        found = [machine.TABLE.get((state, event)) for state in states]  # type: ignore[attr-defined]
        cells = ["" if method is None else method.__name__.strip("_") for method in found]
        lines.append(f"| {event.__name__} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def document() -> str:
    parts = [_HEAD]
    for machine, what in ((IncomingItem, "the receiver's side of an item"), (OutgoingItem, "the sender's")):
        parts.append(f"## `{machine.__name__}`: {what}\n\n{table(machine)}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(document(), end="")
