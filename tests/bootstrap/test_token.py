"""A token that protects nothing is refused where it enters."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiodisagg.bootstrap.server import BootstrapConfig
from aiodisagg.errors import ConfigError
from aiodisagg.peer.config import EncodeConfig


@pytest.mark.parametrize("token", ["", " ", " x", "x\n", "ä"])
def test_an_empty_token_is_none(token: str, tmp_path: Path) -> None:
    """``--token "$UNSET"`` opened the server to the network, and peers with the same mistake were let in."""
    with pytest.raises(ConfigError, match="token"):
        BootstrapConfig(token=token)
    with pytest.raises(ConfigError, match="bootstrap_token"):
        EncodeConfig(model=tmp_path, bootstrap_token=token)


def test_tokens_that_a_header_can_carry() -> None:
    for token in ("x", "let me in", "~!"):
        assert BootstrapConfig(token=token).token == token
