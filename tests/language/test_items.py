"""What a failed item means for its request."""

from __future__ import annotations

from unittest.mock import Mock

import pytest

from aiodisagg.engine.stream import RequestHandle
from aiodisagg.errors import AiodisaggError, DeadlineExceeded, EncodeFailed, MediaError, NoEncodePeer, PoisonItem
from aiodisagg.language.items import Item, Items
from aiodisagg.protocol.events import Fail
from aiodisagg.protocol.messages import ItemKey
from aiodisagg.protocol.rows import RowLayout

KEY = ItemKey(1, 0)


@pytest.mark.parametrize(
    ("code", "kind", "said"),
    [
        ("deadline", DeadlineExceeded, "not finished after 7 s"),
        ("invalid_media", MediaError, "messages[0]: why"),
        ("too_large", MediaError, "messages[0]: why"),
        ("poison", PoisonItem, "messages[0]: why"),
        ("encode_failed", EncodeFailed, "encode_failed: why"),
        ("unreachable", NoEncodePeer, "why"),
        ("draining", NoEncodePeer, "why"),
    ],
)
def test_a_request_fails_with_what_went_wrong(code: str, kind: type[AiodisaggError], said: str) -> None:
    engine = Mock()
    items = Items(engine, RowLayout(16, 3, "bfloat16"))
    handle = RequestHandle("request", Mock())
    items.add(KEY, Item(handle, 0, 7.0, "messages[0]"))
    for _ in range(2):
        items.ended(KEY, Fail(KEY, code, "why", ()))
    ((request, error), _) = engine.fail.call_args
    assert request is handle and type(error) is kind and said in str(error)
    assert engine.fail.call_count == 1
