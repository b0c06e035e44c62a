"""Options that encode and language peers have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from aiodisagg.cli.both import TOKEN_VARIABLE
from aiodisagg.cli.process import GIVEN_FILE, process_options
from aiodisagg.peer.config import ON_REQUEST, TRANSPORTS

Command = Callable[..., None]


def _all(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """These options, in this order."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


peer_options = _all(
    click.option("--model", type=click.Path(path_type=Path), required=True, help="Checkpoint folder."),
    click.option("--device", default="cpu", help="As torch names it."),
    click.option("--bootstrap", multiple=True, help="URL of a bootstrap server; may be given several times."),
    click.option(
        "--bootstrap-token", envvar=TOKEN_VARIABLE, show_envvar=True, help="Token of the bootstrap servers."
    ),
    click.option(
        "--secret-file", type=GIVEN_FILE, help="Shared by all peers: at least 16 bytes, the same on every host."
    ),
    click.option(
        "--transports", show_default=",".join(TRANSPORTS),
        help=f"Data planes that may be used, best first, with commas; {' and '.join(ON_REQUEST)} only where named. "
        "An encode and a language peer need one in common.",
    ),
    click.option(
        "--data-host",
        default="",
        show_default="loopback; with --secret-file every interface",
        help="Address on which network transports receive.",
    ),
)  # fmt: skip
"""Of both kinds of peers: what is needed first."""

rare_peer_options = _all(
    click.option(
        "--row-dtype", default="bfloat16", help="Type of rows and of the vision tower; of all peers the same."
    ),
    click.option("--name", default="", help="For people."),
    click.option("--tls-certificate", type=GIVEN_FILE, help="PEM; encrypts what leaves the host. Needs the next two."),
    click.option("--tls-key", type=GIVEN_FILE, help="Of the certificate."),
    click.option("--tls-authority", type=GIVEN_FILE, help="Who signs the certificates of all peers."),
    process_options,
)
"""Of both kinds of peers: the others."""


def no_dtype(context: click.Context, param: click.Parameter, value: str | None) -> None:
    """Click would propose ``--row-dtype`` alone, with which no language peer takes this one."""
    if value is not None:
        said = "--dtype is of language halves; the tower's is --row-dtype, which must be the same at all peers"
        raise click.UsageError(said, context)
