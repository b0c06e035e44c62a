"""TLS for tests: one certificate of 127.0.0.1 that both sides show and that signed itself."""

from __future__ import annotations

import ssl
from pathlib import Path

CERTIFICATE = Path(__file__).parents[1] / "link" / "localhost.pem"
"""The certificate and its key; valid for a hundred years."""


def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """For those who connect and for connecting; both sides have to show a certificate."""
    theirs, ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    theirs.verify_mode = ssl.CERT_REQUIRED
    for context in (theirs, ours):
        context.load_cert_chain(CERTIFICATE)
        context.load_verify_locations(CERTIFICATE)
    return theirs, ours
