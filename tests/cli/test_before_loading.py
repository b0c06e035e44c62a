"""What can be seen at once is told at once: not after a model was loaded, which takes minutes."""

from __future__ import annotations

import shlex
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.test_cli_mistakes import call


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which somebody else listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock.getsockname()[1]


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(config: object) -> object:
        raise AssertionError("this would have taken minutes")

    monkeypatch.setattr("aiodisagg.encode.service.load_encoder", load)
    monkeypatch.setattr("aiodisagg.language.service.load_language_half", load)


@pytest.mark.parametrize(
    ("command", "options", "said"),
    [
        ("language", "--port {port}", "port: {port} is in use on 127.0.0.1"),
        ("both", "--port {port}", "port: {port} is in use on 127.0.0.1"),
        ("both --separate", "--port {port}", "port: {port} is in use on 127.0.0.1"),
        ("encode", "--http-port {port}", "http_port: {port} is in use on 127.0.0.1"),
        ("encode", "--listen tcp:127.0.0.1:{port}", "listen: cannot listen on tcp:127.0.0.1:{port}"),
        ("encode", "--zero-deepstack --listen tcp:127.0.0.1:{port}", "listen: cannot listen on tcp:127.0.0.1:{port}"),
        ("encode", "--data-host 192.0.2.1", "data_host: 192.0.2.1 cannot be listened on"),
        ("language", "--port 0 --data-host 192.0.2.1", "data_host: 192.0.2.1 cannot be listened on"),
        ("both", "--port 0 --data-host 192.0.2.1", "data_host: 192.0.2.1 cannot be listened on"),
        ("both --separate", "--port 0 --data-host 192.0.2.1", "data_host: 192.0.2.1 cannot be listened on"),
        ("both", "--port 0 --listen tcp:127.0.0.1:{port}", "listen: cannot listen on tcp:127.0.0.1:{port}"),
        ("encode", "--listen tcp:0.0.0.0:0", "secret: tcp:0.0.0.0:0 can be reached by other hosts; links need a"),
        ("encode", "--listen tcp:not..a..name:7001", "listen: cannot listen on tcp:not..a..name:7001: the name "),
        ("encode", "--name {long}", "name: must have at most 256 characters, not 257"),
        ("both --separate", "--name {long}", "name: must have at most 256 characters, not 257"),
        ("bootstrap", "--host 0.0.0.0", "host: 0.0.0.0 can be reached by other hosts; that needs a token (--token, "),
        ("language", "--served-model-name ' '", "served_names: one is empty or there twice: ' ' (--served-model-name)"),
        ("language", "--port 0 --host not..a..name", "host: not..a..name cannot be listened on"),
        ("encode", "--http-port 0 --http-host not..a..name", "http_host: not..a..name cannot be listened on"),
        ("language", "--bootstrap localhost:8500", "bootstrap: 'localhost:8500' is not the http(s) URL of a server"),
        ("encode", "--bootstrap http://host:port", "bootstrap: 'http://host:port' is not the http(s) URL of a server"),
        ("both", "--bootstrap http://a?b=c", "bootstrap: 'http://a?b=c' is not the http(s) URL of a server"),
        ("both", "--bootstrap http://", "bootstrap: 'http://' is not the http(s) URL of a server"),
        ("language", "--tls-certificate {pem} --tls-key {pem} --tls-authority {pem}", "tls_certificate: {pem}: "),
        ("encode", "--tls-certificate {pem} --tls-key {pem} --tls-authority {pem}", "tls_certificate: {pem}: "),
    ],
)
def test_a_mistake_is_told_before_anything_is_loaded(
    command: str, options: str, said: str, taken: int, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    pem = tmp_path / "none.pem"
    pem.write_text("nothing", encoding="ascii")
    model = "" if command == "bootstrap" else f"--model {tiny(moe=True, levels=3)}"
    given = f"{command} {model} {options}".format(port=taken, pem=pem, long=257 * "x")
    found = call(*shlex.split(given))
    assert found.exit_code == 1
    assert found.output.startswith("Error: " + said.format(port=taken, pem=pem)), found.output
    assert found.output.count("\n") == 1


def test_no_folder_for_temporary_files_is_named(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only container: thirty lines of traceback out of torch."""
    folder = str(tiny(moe=True, levels=3))
    monkeypatch.setattr("tempfile._candidate_tempdir_list", lambda: ["/proc/none"])
    monkeypatch.setattr("tempfile.tempdir", None)
    for command in ("encode", "language", "both"):
        found = call(command, "--model", folder)
        assert found.exit_code == 1
        assert found.output.startswith("Error: TMPDIR: No usable temporary directory found in ['/proc/none'], and ")
        assert found.output.count("\n") == 1
