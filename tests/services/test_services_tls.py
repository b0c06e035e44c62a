"""Links and data planes with TLS: the same answers, and nobody without a certificate is spoken to."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiodisagg import EncodeService, LanguageService
from aiodisagg.errors import ConfigError, NoEncodePeer
from aiodisagg.peer.tls import Tls
from aiodisagg.transport.description import unpack
from aiodisagg.transport.stream import StreamTransport
from aiodisagg.transport.stream import _Pool as StreamPool
from aiodisagg.transport.zmq import ZmqTransport
from aiodisagg.transport.zmq import _Pool as ZmqPool
from tests.models.halves import PROMPTS
from tests.services.system import System, encode_config, language_config, system
from tests.transport.certificate import CERTIFICATE

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

TLS = Tls(CERTIFICATE, CERTIFICATE, CERTIFICATE)
OVER_TCP = {"listen": "tcp:127.0.0.1:0"}
SECRET = {"secret": b"as long as it has to be"}
QUESTION = next(messages for name, messages in PROMPTS.items() if "image" in name)


def encrypted(made: System) -> bool:
    """Does the pool say that it is received into by encrypted connections only?"""
    (transport,) = made.language.rows.planes.open_transports.values()
    if isinstance(transport, StreamTransport):
        return unpack("stream", StreamPool, transport.describe()).tls
    assert isinstance(transport, ZmqTransport)
    return len(unpack("zmq", ZmqPool, transport.describe()).server_key) == 40


@pytest.mark.parametrize("name", ["stream", "zmq"])
async def test_answers_are_the_same_when_everything_is_encrypted(moe: Path, name: str) -> None:
    async with system(moe, transports=("memory",)) as plain:
        wanted = await plain.ask(QUESTION)
    encode = {"tls": TLS, **OVER_TCP, **SECRET}
    async with system(moe, transports=(name,), encode=encode, tls=TLS, **SECRET, blocks=3) as made:
        assert encrypted(made)
        assert await made.ask(QUESTION) == wanted
        assert made.language.receiver.counters.total("received") > 0
    async with system(moe, transports=(name,), encode=OVER_TCP | SECRET, **SECRET) as made:
        assert not encrypted(made)


async def test_a_peer_without_a_certificate_is_not_linked(moe: Path) -> None:
    for theirs, ours in ((TLS, None), (None, TLS)):
        config = encode_config(moe, transports=("stream",), tls=theirs, **OVER_TCP, **SECRET)
        mine = language_config(moe, transports=("stream",), tls=ours, **SECRET, peer_wait_s=0.5)
        async with LanguageService(mine) as language, EncodeService(config) as encoder:
            language.add_peer(encoder.address)
            with pytest.raises(NoEncodePeer):
                await System(language, [encoder]).ask(QUESTION)


async def test_files_that_are_no_certificates_are_a_mistake_of_the_configuration(moe: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("nothing")
    with pytest.raises(ConfigError, match="tls"):
        async with LanguageService(language_config(moe, tls=Tls(wrong, wrong, CERTIFICATE))):
            pass
