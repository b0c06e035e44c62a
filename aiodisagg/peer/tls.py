"""TLS between peers: whose certificate is believed, and which one is shown. Both sides of a connection show theirs."""

from __future__ import annotations

import ssl
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
        try:
            for context in (incoming, outgoing):
                context.minimum_version = ssl.TLSVersion.TLSv1_3
                context.load_cert_chain(self.certificate, self.key)
                context.load_verify_locations(self.authority)
        except OSError as error:
            raise ConfigError("tls", f"{self.certificate}, {self.key}, {self.authority}: {error}") from error
        return incoming, outgoing
