"""Bugs planted on purpose: a test that cannot fail proves nothing, so each of these must make a world fail."""

from __future__ import annotations

from random import Random

import pytest

from . import mutations
from .mutations import MUTATIONS, Mutation
from .plans import draw
from .world import World

KNOWN = mutations.known()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what.replace(" ", "-"))
def test_a_planted_bug_is_noticed(mutation: Mutation) -> None:
    """The world or cut that docs/mutations.md names, or another one, fails; without the bug it does not."""
    first = KNOWN.get(mutation.what, 0)
    found = mutations.hunt(mutation, first)
    assert found is not None, f"nobody noticed: {mutation.what}"
    by, how = found
    print(f"{mutation.what}: world {by}: {how}")
    if by.isdigit():
        World(draw(Random(int(by)))).run()


def test_the_table_lists_every_planted_bug() -> None:
    """docs/mutations.md is about these mutations; if this fails, generate it again."""
    text = (mutations.Path(__file__).parents[2] / "docs" / "mutations.md").read_text()
    assert len(MUTATIONS) >= 12
    for mutation in MUTATIONS:
        assert f"| {mutation.what} | `{mutation.where.__name__}.{mutation.method}` |" in text
    assert "not caught" not in text
