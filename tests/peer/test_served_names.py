"""What clients may call a model, unless told otherwise: its folder, as it is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiodisagg.both.service import BothService
from aiodisagg.errors import ConfigError
from aiodisagg.language.service import LanguageService
from aiodisagg.peer.config import EncodeConfig, LanguageConfig


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A model as a hub's cache keeps it."""
    made = tmp_path / "snapshots" / "0c351dd01ed87e9c1b53cbc748cba10e6187ff3b"
    made.mkdir(parents=True)
    (tmp_path / "qwen-vl").symlink_to(made)
    return tmp_path / "qwen-vl"


@pytest.mark.parametrize("written", ["{}", "{}/", "{}/."])
def test_a_link_is_called_as_it_is(snapshot: Path, written: str) -> None:
    model = Path(written.format(snapshot))
    assert LanguageService(LanguageConfig(model=model)).model_names == ("qwen-vl",)
    both = BothService(LanguageConfig(model=model), EncodeConfig(model=model))
    assert both.model_names == ("qwen-vl",)


@pytest.mark.parametrize("written", [".", "../here", "sub/.."])
def test_folders_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str) -> None:
    (tmp_path / "here" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert LanguageConfig(model=Path(written)).model_names == ("here",)


def test_other_names(snapshot: Path) -> None:
    service = LanguageService(LanguageConfig(model=snapshot, served_names=("qwen", "qwen-latest")))
    assert (service.model_name, service.model_names) == ("qwen", ("qwen", "qwen-latest"))


@pytest.mark.parametrize("names", [("",), ("qwen", " "), ("qwen", "vl", "qwen")])
def test_names_that_are_none(snapshot: Path, names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="served_names: one is empty or there twice"):
        LanguageConfig(model=snapshot, served_names=names)
