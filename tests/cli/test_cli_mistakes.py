"""What a user gets wrong on the command line is named, with what to do; before anything is started."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from aiodisagg.cli import main
from aiodisagg.cli.main import http_config
from aiodisagg.cli.process import NEW_FILE


def call(*arguments: str) -> Result:
    found = CliRunner().invoke(main, arguments)
    assert found.exception is None or isinstance(found.exception, SystemExit), repr(found.exception)
    return found


def options_of(command: click.Command, *path: str) -> Iterator[tuple[tuple[str, ...], click.Option]]:
    """Every option of every command below ``command``, with how that command is called."""
    if isinstance(command, click.Group):
        for name, own in command.commands.items():
            yield from options_of(own, *path, name)
    for param in command.params:
        if isinstance(param, click.Option):
            yield path, param


FILES = [
    pytest.param(path, option.opts[0], id=f"{'-'.join(path)}{option.opts[0]}")
    for path, option in options_of(main)
    if isinstance(option.type, click.Path) and option.opts[0] != "--model"
]


@pytest.mark.parametrize(("command", "option"), FILES)
def test_a_folder_where_a_file_is_wanted(command: tuple[str, ...], option: str, tmp_path: Path) -> None:
    found = call(*command, option, str(tmp_path))
    assert found.exit_code == 2
    assert f"'{option}'" in found.output and "is a directory" in found.output


@pytest.mark.parametrize(
    ("command", "option"), [case for case in FILES if case.values[1] in ("--json", "--plot", "--outcomes", "--out")]
)
@pytest.mark.parametrize(
    ("path", "why"),
    [("nowhere/a.json", "No such file or directory"), ("a-file/a.json", "Not a directory"), ("x" * 300, "too long")],
    ids=["no folder", "no folder but a file", "no name"],
)
def test_what_cannot_be_written_is_said_before_anything_is_measured(
    command: tuple[str, ...], option: str, path: str, why: str, tmp_path: Path
) -> None:
    """All of a run was done, and then its results could not be kept."""
    (tmp_path / "a-file").touch()
    found = call(*command, option, str(tmp_path / path))
    assert found.exit_code == 2
    assert f"'{option}'" in found.output and "cannot be written" in found.output and why in found.output


def test_looking_whether_a_file_can_be_written_leaves_nothing_and_changes_nothing(tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text("kept", encoding="utf-8")
    for file in (old, new):
        assert NEW_FILE.convert(str(file), None, None) == file
    assert old.read_text(encoding="utf-8") == "kept" and not new.exists()


@pytest.mark.parametrize("command", [("encode",), ("both",), ("both", "--separate")], ids=" ".join)
def test_a_model_without_a_tower_cannot_encode(command: tuple[str, ...], text_only: Path) -> None:
    found = call(*command, "--model", str(text_only))
    assert found.exit_code == 1
    assert found.output == f"Error: {text_only}: config.json: architectures: Qwen3ForCausalLM has no vision tower\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("demo", "--kill-encoder", "--encoders", "1"), "encoders: --kill-encoder needs at least 2"),
        (("demo", "--requests", "0"), "'--requests': 0 is not in the range"),
        (("encode", "--source-mib", "0"), "'--source-mib': 0 is not in the range"),
        (("both", "--source-mib", "0"), "'--source-mib': 0 is not in the range"),
        (("encode", "--listen", "nowhere"), "'--listen': 'nowhere' is none of unix:@name"),
        (("both", "--listen", "tcp:x:99999"), "'--listen': 'tcp:x:99999' is none of unix:@name"),
        (("bootstrap", "--port", "99999"), "'--port': 99999 is not in the range"),
        (("encode", "--http-port", "65536"), "'--http-port': 65536 is not in the range"),
        (("language", "--port", "-1"), "'--port': -1 is not in the range"),
        (("both", "--port", "65536"), "'--port': 65536 is not in the range"),
        (("language", "--peer", "unix:" + "x" * 108), "a unix address has at most 107 bytes"),
        (("language", "--kv-mib", "0"), "'--kv-mib': 0 is not in the range"),
        (("language", "--pool-mib", "0"), "'--pool-mib': 0.0 is not in the range"),
        (("language", "--cache-mib", "-1"), "'--cache-mib': -1.0 is not in the range"),
        (("language", "--model", ".", "--cache-mib", "nan"), "Error: cache_bytes: must be finite, not nan MiB"),
        (("both", "--model", ".", "--pool-mib", "inf"), "Error: pool_bytes: must be finite, not inf MiB"),
        (("language", "--model", ".", "--max-pixels", "-5"), "Error: max_pixels: must be at least 0, not -5"),
        (("language", "--max-requests", "0"), "'--max-requests': 0 is not in the range"),
        (("both", "--model", ".", "--http-port", "0"), "http_port: is a tower's in a process of its own (--separate)"),
        (("language", "--model", ".", "--data-host", "localhost"), "data_host: 'localhost' is not an address"),
        (("language", "--model", ".", "--media-domain", "a/b"), "http.allowed_media_domains: 'a/b' is not a host name"),
        (("bench", "load", "--dtype", "foo"), "'foo' is not one of 'bfloat16'"),
        (("demo", "--dtype", "foo"), "'foo' is not one of 'bfloat16'"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_meant(arguments: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_demo(options: object) -> int:
        raise AssertionError(f"would have begun with {options}")

    monkeypatch.setattr("aiodisagg.demo.run.run_demo", run_demo)
    found = call(*arguments)
    assert found.exit_code and said in found.output, found.output


@pytest.mark.parametrize("content", ['{"key": "x"}', "not JSON"])
def test_a_keys_file_that_is_none_is_named(content: str, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text(content, encoding="utf-8")
    found = call("language", "--model", str(tmp_path), "--keys-file", str(file))
    assert found.exit_code == 1 and found.output.startswith(f"Error: keys_file: {file}: "), found.output
    assert '[{"key": "...", "tenant": "..."}]' in found.output


@pytest.mark.parametrize("role", ["language", "both"])
def test_where_media_may_come_from_can_be_said(role: str) -> None:
    def config(*arguments: str) -> Any:
        command = main.commands[role]
        return http_config(command.make_context(role, ["--model", ".", *arguments]).params)

    usual = config()
    assert (usual.allow_private_media_hosts, usual.allowed_media_domains) == ((), None)
    said = config("--allow-private-media", "--media-domain", "example.com", "--media-domain", "localhost")
    assert said.allowed_media_domains == ("example.com", "localhost")
    assert {"10.0.0.0/8", "127.0.0.0/8", "fc00::/7"} <= set(said.allow_private_media_hosts)
    assert not any(network.startswith(("169.", "0.")) for network in said.allow_private_media_hosts)


@pytest.mark.parametrize("given", [(), ("--name", "x")], ids=["no name", "a name"])
def test_a_tower_of_its_own_has_the_name_of_its_peer(
    given: tuple[str, ...], tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str]] = []

    async def serve(front: object, config: Any, arguments: list[str], *rest: object) -> None:
        seen.append((config.name, arguments[arguments.index("--name") + 1]))

    monkeypatch.setattr("aiodisagg.cli.both._serve_separate", serve)
    for _ in range(2):
        assert call("both", "--separate", "--model", str(tiny(moe=True, levels=3)), *given).exit_code == 0
    assert all(tower == f"{name}-tower" for name, tower in seen)
    names = {name for name, _ in seen}
    assert names == {"x"} if given else len(names) == 2 and all(name.startswith("both-") for name in names)
