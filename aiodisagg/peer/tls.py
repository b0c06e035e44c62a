"""TLS between peers: whose certificate is believed, and which one is shown. Both sides of a connection show theirs."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from aiodisagg.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Tls:
    """Files in PEM format.

    Who connects checks that the other's certificate names the host or address that was dialled; who is connected to
    checks that the certificate was signed.
    """

    certificate: Path
    """This peer's, with the addresses under which others reach it."""
    key: Path
    authority: Path
    """Who signs the certificates of all peers."""

    def contexts(self) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        """For those who connect, and for connecting to others. Raises ConfigError: a file cannot be read or used."""
        incoming, outgoing = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        incoming.verify_mode = ssl.CERT_REQUIRED
        # What load_cert_chain refuses may be either file: with the certificate looked at before, it is the key.
        looks = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        with _named("tls_certificate", self.certificate, "a certificate"):
            looks.load_verify_locations(self.certificate)
        for context in (incoming, outgoing):
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            with _named("tls_key", self.key, f"the key of {self.certificate}"):
                context.load_cert_chain(self.certificate, self.key)
            with _named("tls_authority", self.authority, "a certificate"):
                context.load_verify_locations(self.authority)
        return incoming, outgoing


@contextmanager
def _named(key: str, file: Path, what: str) -> Iterator[None]:
    """Errors of ``file`` as ConfigError; ``what`` it should hold."""
    try:
        yield
    except ssl.SSLError as error:
        raise ConfigError(key, f"{file}: does not hold {what} as PEM: {error}") from error
    except OSError as error:
        raise ConfigError(key, f"{file}: {error.strerror or error}") from error
