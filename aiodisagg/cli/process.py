"""How a peer's process runs: its loop, its signals, its log, the word that it is ready, and its end with its parent."""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import json
import logging
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, Protocol

import click

from aiodisagg.errors import AiodisaggError, ConfigError, own_error
from aiodisagg.link import address
from aiodisagg.peer.garbage import settle
from aiodisagg.scheduler.order import Order

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
FILES, FEW_FILES = 65536, 1024
"""Open at once, if the host lets a process have so many; a warning is given where that is fewer than a shell has."""


class NewFile(click.Path):
    """A file that will be written at the end, perhaps of hours: whether it can be is seen before anything begins."""

    def __init__(self) -> None:
        super().__init__(path_type=Path, dir_okay=False, writable=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            pass  # click has looked at it, and a pipe must not be opened twice
        except OSError as error:
            self.fail(f"{path} cannot be written: {error.strerror}.", param, ctx)
        else:
            path.unlink()
        return path


FILE = click.Path(path_type=Path, dir_okay=False)
"""One that is read before anything begins."""
NEW_FILE = NewFile()
GIVEN_FILE = click.Path(path_type=Path, dir_okay=False, exists=True)
"""One that must be there, for those that are not looked at before anything has begun."""
KEY_VARIABLE = "AIODISAGG_API_KEY"
POSITIVE = click.FloatRange(min=0, min_open=True)
PORT = click.IntRange(0, 65535)

Command = Callable[..., None]
Announce = Callable[[Mapping[str, str]], None]


def setup_logging(verbose: int, name: str) -> None:
    """One line an event on stderr, with the process's role."""
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(
        level=level,
        stream=sys.stderr,
        format=f"%(asctime)s.%(msecs)03d %(levelname).1s {name} %(name)s: %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
    )


def die_with_parent(parent: int) -> None:
    """Has the kernel send SIGTERM when process ``parent`` ends, however it ends; exits if it has ended already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # also if it ended before this process had begun to look
        raise SystemExit("the parent ended before this process began")


def run(service: Callable[[asyncio.Event, Announce], Awaitable[None]], ready_fd: int | None = None) -> None:
    """Runs a service. Errors become one line.

    The service says by its second argument that it is ready: a line for a person, or JSON on the descriptor
    ``ready_fd`` that a launcher waits on. SIGINT or SIGTERM end the process at once before that, when nobody has asked
    it for anything; after it the first sets the event, a second ends at once.
    """
    import uvloop

    if ready_fd is not None:
        os.set_inheritable(ready_fd, False)  # the launcher reads to its end: no child may keep it open

    async def body() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()

        def on_signal(number: int) -> None:
            if stop.is_set():
                _end(number)
            stop.set()

        def announce(facts: Mapping[str, str]) -> None:
            settle()
            for number in _SIGNALS:
                loop.add_signal_handler(number, on_signal, number)
            if ready_fd is not None:
                with os.fdopen(ready_fd, "w") as out:
                    json.dump(dict(facts), out)
            else:
                say("ready: " + ", ".join(f"{key} {value}" for key, value in facts.items()))

        await service(stop, announce)

    before = {number: signal.signal(number, _end) for number in _SIGNALS}  # the loop's would wait for its imports
    try:
        uvloop.run(body())
    except AiodisaggError as error:
        raise click.ClickException(str(error)) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say(line: str, *, err: bool = False) -> None:
    """For a person, who may have left: a full disk, or a pipe whose reader ended, is no reason not to serve."""
    try:
        click.echo(line, err=err)
    except OSError as error:
        logger.warning("%s (stdout or stderr cannot be written: %s)", line, error.strerror)
        _drop_what_cannot_be_written()


def _drop_what_cannot_be_written() -> None:
    """What is left in a stream's buffer would fail once more at the end, and change the exit code."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed when the process started
        try:
            stream.flush()
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)


def _end(number: int, _frame: object = None) -> NoReturn:
    os._exit(128 + number)


def fail(error: AiodisaggError) -> NoReturn:
    """Ends the process with an error, at once: without waiting for threads, which may be loading."""
    click.ClickException(str(error)).show()
    os._exit(1)


class Serving(Protocol):
    """A service, as far as its end goes."""

    async def serve(self) -> None:
        """Returns when the service is left; raises what makes it useless."""


async def until(stop: asyncio.Event, service: Serving) -> None:
    """Returns when the process shall stop; raises what ends the service before: a new process is better then."""
    try:
        async with asyncio.TaskGroup() as group:
            serving = group.create_task(service.serve())
            await stop.wait()
            serving.cancel()
    except ExceptionGroup as failed:
        raise own_error(failed) from None


def check_temporary() -> None:
    """Raises ConfigError where torch cannot be imported, as in a container whose file system is read-only."""
    try:
        tempfile.gettempdir()
    except OSError as error:
        text = f"{error.strerror}, and torch needs one that can be written: mount one at /tmp, or name it"
        raise ConfigError("TMPDIR", text) from error


def not_empty(variable: str, value: str | None) -> str | None:
    """``value`` of an option that ``variable`` has otherwise. Raises ConfigError for a variable that is set but empty,
    as of a secret that a container was not given: click takes it for none, which opens what a secret keeps closed."""
    if value is None and variable in os.environ:
        raise ConfigError(variable, "is set but empty; unset it if there shall be none")
    return value


def process_options(command: Command) -> Command:
    """Options of every long-running process."""
    for option in (
        click.option("-v", "--verbose", count=True, help="Log more; -vv logs every chunk."),
        click.option("--ready-fd", type=int, hidden=True),
        click.option("--parent", type=int, hidden=True),
    ):
        command = option(command)
    return command


def raise_file_limit() -> None:
    """A peer holds up to eight descriptors for each other one, and shells give 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted < FEW_FILES:  # libuv hangs up on who connects when there are no more, and says nothing
        text = "only %d files may be open at once (ulimit -Hn): peers and clients are hung up on when there are more"
        logger.warning(text, wanted)


def hold_standard_streams() -> None:
    """If stdout is closed when a process starts, the first socket gets its number, and libuv aborts when that socket is
    closed."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)


def begin(name: str, verbose: int, parent: int | None) -> None:
    """The first thing a long-running process does."""
    hold_standard_streams()
    atexit.register(_drop_what_cannot_be_written)  # of log lines, too
    setup_logging(verbose, name)
    raise_file_limit()
    if parent is not None:
        die_with_parent(parent)


async def begin_loading(halves: str, model: Path, device: str, ready_fd: int | None) -> Callable[[], None]:
    """Says on stderr that a peer loads, which may take minutes; the result says that it has. A launcher, which waits on
    ``ready_fd``, shows that by itself. Raises ConfigError if there is no such device."""
    if ready_fd is not None:
        return lambda: None
    from aiodisagg.models.loading import check_device  # torch takes seconds

    await asyncio.to_thread(check_device, device)
    say(f"loading {halves} of {model} on {device} ...", err=True)
    began = time.monotonic()
    return lambda: say(f"loaded in {time.monotonic() - began:.1f} s", err=True)


def check_address(context: click.Context, param: click.Parameter, value: str | tuple[str, ...]) -> Any:
    """Of an option that says where links are accepted or dialled."""
    for one in (value,) if isinstance(value, str) else value:
        try:
            address.parse(one)
        except ConfigError as error:
            raise click.BadParameter(error.message, context, param) from error
    return value


def order_option(command: Command) -> Command:
    """``--order``, wherever requests wait."""
    return click.option(
        "--order",
        type=click.Choice([order.value for order in Order]),
        default=Order.SHORT_FIRST.value,
        callback=lambda context, param, value: Order(value),
        help="Of those that wait: who needs least first, or by arrival.",
    )(command)
