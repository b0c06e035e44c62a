"""What options of the HTTP API come to."""

from __future__ import annotations

from typing import Any

import click
import pytest
from click.testing import CliRunner

from aiodisagg.api import HttpConfig
from aiodisagg.cli import main
from aiodisagg.cli.main import http_config, language_config


def options(command: str, *arguments: str) -> dict[str, Any]:
    """Those of a command, as they are when it runs."""
    found = main.commands[command]
    assert isinstance(found, click.Command)
    return found.make_context(command, ["--model", ".", *arguments]).params


@pytest.mark.parametrize("command", ["language", "both"])
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), 1024 + 64 + 1024),
        (("--max-queue", "5000", "--max-running", "200"), 5000 + 200 + 1024),
        (("--max-requests", "7", "--max-queue", "5000"), 7),
    ],
    ids=["default", "a long line", "given"],
)
def test_the_door_is_wider_than_the_line(command: str, arguments: tuple[str, ...], expected: int) -> None:
    assert http_config(options(command, *arguments)).max_requests == expected


@pytest.mark.parametrize("command", ["language", "both"])
def test_a_key_that_is_set_but_empty_does_not_open_the_api(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a secret that a container was not given."""
    monkeypatch.setenv("AIODISAGG_API_KEY", "")
    found = CliRunner().invoke(main, [command, "--model", "."])
    assert found.exit_code == 1 and found.output.startswith("Error: AIODISAGG_API_KEY: is set but empty"), found.output
    assert http_config(options(command, "--api-key", "given")).api_key == "given"
    monkeypatch.setenv("AIODISAGG_API_KEY", "set")
    assert http_config(options(command)).api_key == "set"
    monkeypatch.delenv("AIODISAGG_API_KEY")
    assert http_config(options(command)).api_key is None


@pytest.mark.parametrize(
    "command", ["bootstrap --host 192.0.2.1", "encode --model .", "language --model .", "both --model ."]
)
def test_a_bootstrap_token_that_is_set_but_empty_is_not_none(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer would be told by the server that its token is wrong, again and again, and the server would have none."""
    monkeypatch.setenv("AIODISAGG_BOOTSTRAP_TOKEN", "")
    found = CliRunner().invoke(main, command.split())
    assert found.exit_code == 1
    assert found.output.startswith("Error: AIODISAGG_BOOTSTRAP_TOKEN: is set but empty"), found.output


@pytest.mark.parametrize("command", ["language", "both"])
def test_names_of_the_model(command: str) -> None:
    given = options(command, "--served-model-name", "qwen", "--served-model-name", "qwen-latest")
    assert language_config(given).model_names == ("qwen", "qwen-latest")


@pytest.mark.parametrize("command", ["language", "both"])
def test_how_long_an_answer_is_whose_length_nobody_named(command: str) -> None:
    assert http_config(options(command)).default_max_tokens == HttpConfig().default_max_tokens
    assert http_config(options(command, "--default-max-tokens", "77")).default_max_tokens == 77
