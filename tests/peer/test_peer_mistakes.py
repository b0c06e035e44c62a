"""Transports, TLS, ports and folders that cannot be had here: the error says which of them, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aiodisagg.bootstrap.server import BootstrapServer
from aiodisagg.errors import ConfigError, TransportUnavailable
from aiodisagg.peer import planes
from aiodisagg.peer.config import EncodeConfig
from aiodisagg.peer.http import MetricsServer
from aiodisagg.peer.planes import Planes
from aiodisagg.peer.tls import Tls

PEM = (Path(__file__).parents[1] / "link" / "localhost.pem").read_text(encoding="ascii")
"""A certificate and its key."""


@pytest.mark.anyio
async def test_when_no_transport_works_it_is_said_why_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {"mooncake": "no RDMA device", "zmq": "this libzmq has no CURVE"}

    def make(name: str, *rest: object) -> Any:
        raise TransportUnavailable(name, reasons[name])

    monkeypatch.setattr(planes, "make_transport", make)
    with pytest.raises(TransportUnavailable) as caught:
        await Planes(tuple(reasons), "127.0.0.1").open(None, lambda *_: False, incarnation="x")
    reason = "mooncake: no RDMA device; zmq: this libzmq has no CURVE"
    assert str(caught.value) == f"transports: none works on this machine: {reason}"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A certificate, its key, another key, and a file that is neither."""
    own, begin = PEM.partition("-----BEGIN PRIVATE KEY-----")[::2]
    made = {"certificate": own, "key": f"-----BEGIN PRIVATE KEY-----{begin}", "nothing": "nothing"}
    for name, text in made.items():
        (tmp_path / name).write_text(text, encoding="ascii")
    return {name: tmp_path / name for name in (*made, "missing")}


@pytest.mark.parametrize(
    ("certificate", "key", "authority", "named"),
    [
        ("key", "certificate", "certificate", "tls_certificate: {key}"),
        ("certificate", "certificate", "certificate", "tls_key: {certificate}"),
        ("certificate", "nothing", "certificate", "tls_key: {nothing}"),
        ("certificate", "key", "key", "tls_authority: {key}"),
        ("certificate", "missing", "certificate", "tls_key: {missing}"),
        ("missing", "key", "certificate", "tls_certificate: {missing}"),
        ("certificate", "key", "nothing", "tls_authority: {nothing}"),
    ],
)
def test_the_tls_file_that_is_not_what_it_should_be_is_named(
    files: dict[str, Path], certificate: str, key: str, authority: str, named: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        Tls(files[certificate], files[key], files[authority]).contexts()
    assert str(caught.value).startswith(named.format(**files) + ": ")


def test_tls_files_that_are_right(files: dict[str, Path]) -> None:
    Tls(files["certificate"], files["key"], files["certificate"]).contexts()


@pytest.mark.parametrize("port", [-1, 65536, 99999])
def test_a_port_that_is_none_is_not_taken_for_another(port: int) -> None:
    """The server was at the port modulo 65536, which nobody had named."""
    with pytest.raises(ConfigError, match=f"^port: must be between 0 and 65535, not {port}"):
        BootstrapServer("127.0.0.1", port)
    with pytest.raises(ConfigError, match=f"^http_port: must be between 0 and 65535, not {port}"):
        MetricsServer(str, lambda: (True, ""), "127.0.0.1", port)


def test_a_folder_may_be_a_string(tmp_path: Path) -> None:
    assert EncodeConfig(model=str(tmp_path)).model == tmp_path  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^model: no such folder: /nowhere"):
        EncodeConfig(model="/nowhere")  # type: ignore[arg-type]


def test_a_name_on_the_hub_is_no_folder() -> None:
    name = "Qwen/Qwen3-VL-30B-A3B-Instruct"
    said = f"model: no such folder: {name}; names on the hub are not fetched, `hf download {name} --local-dir FOLDER`"
    with pytest.raises(ConfigError) as caught:
        EncodeConfig(model=Path(name))
    assert str(caught.value) == f"{said} does that"
    for folder in ("/Qwen/Qwen3", "Qwen3", "./Qwen/Qwen3", "a/Qwen/Qwen3"):
        with pytest.raises(ConfigError) as caught:
            EncodeConfig(model=Path("/nowhere", folder))
        assert "hub" not in str(caught.value)
