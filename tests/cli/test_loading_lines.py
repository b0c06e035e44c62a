"""A peer that loads says so, and when it is done; and what is asked of its options."""

from __future__ import annotations

import re
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from aiodisagg.cli import main
from aiodisagg.data import digits_model


@pytest.mark.parametrize(
    ("command", "halves", "phases"),
    [
        (("encode",), "the encode half", ("loading the encode half", "measuring the tower")),
        (("language", "--port", "0"), "the language half", ("loading the language half", "warming the engine")),
        (("both", "--port", "0"), "both halves", ("loading the encode half", "loading the language half")),
    ],
)
def test_loading_is_told(command: tuple[str, ...], halves: str, phases: tuple[str, ...]) -> None:
    """A minute and a half of nothing looked like a peer that hangs."""
    folder = digits_model()
    lines = []
    with subprocess.Popen(
        [sys.executable, "-m", "aiodisagg", *command, "-v", "--model", str(folder)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if line.startswith("ready: "):
                process.terminate()
                break
        process.stdout.read()
    plain = [line for line in lines if not re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", line)]
    assert plain[0] == f"loading {halves} of {folder} on cpu ..."
    assert re.fullmatch(r"loaded in \d+\.\d s", plain[1]) and plain[2].startswith("ready: ") and len(plain) == 3
    told = "\n".join(lines[lines.index(plain[0]) : lines.index(plain[1])])
    assert all(phase in told for phase in phases), told


@pytest.mark.parametrize("command", ["encode", "language", "both"])
def test_help_begins_with_what_is_needed(command: str) -> None:
    found = CliRunner().invoke(main, [command, "--help"], terminal_width=1000)
    options = re.findall(r"^  (?:-., )?(--[a-z-]+)", found.output, re.MULTILINE)
    first = ["--model", "--device", "--bootstrap", "--bootstrap-token", "--secret-file", "--transports", "--data-host"]
    assert options[:7] == first and len(options) == len(set(options))
    said = " ".join(found.output.split())
    assert "zmq and mooncake-tcp only where named" in said and "memory,ipc,mooncake,stream" in said
    of_both = {param.name for name in ("encode", "language") for param in main.commands[name].params}
    unseen = {"zero_deepstack", "steps_fd", "no_dtype"}
    if command == "both":
        named = {param.name for param in main.commands[command].params}
        assert named == (of_both | {"separate", "inline"}) - unseen


def test_an_option_of_the_other_half_is_explained() -> None:
    """Click proposed ``--row-dtype`` alone, with which no language peer took the encode peer."""
    found = CliRunner().invoke(main, ["encode", "--model", ".", "--dtype", "float32"])
    assert found.exit_code == 2 and "Did you mean" not in found.output
    assert (
        "--dtype is of language halves; the tower's is --row-dtype, which must be the same at all peers" in found.output
    )
    both = main.commands["both"]
    assert isinstance(both, click.Command) and {"dtype", "row_dtype"} < {param.name for param in both.params}
