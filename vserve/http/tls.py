"""Tls: the server's certificate, and the live context that takes a new one.

Owns the SSLContext.  L only; reading the files blocks for well under a millisecond.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass

from vserve.errors import StartupError


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files.  keyfile: None when the certificate's file holds the key too.  ca_certs: the authorities of client
    certificates, which are then required."""

    certfile: str
    keyfile: str | None = None
    ca_certs: str | None = None


class Tls:
    """A context made from files, which can be read again."""

    def __init__(self, files: TlsFiles) -> None:
        """Raises StartupError, one line, when the files cannot be used."""
        self._files = files
        self.context = self._fresh()

    def reload(self) -> None:
        """Use the files as they are now for handshakes to come; connections that are open go on as they are.

        Raises StartupError, and keeps what was loaded before, when they cannot be used.  An authority that was taken
        out of ca_certs stays trusted until a restart: OpenSSL's store only grows.
        """
        self._fresh()  # a certificate without its key in the live context would break every handshake
        _load(self.context, self._files)

    def _fresh(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        _load(context, self._files)
        if self._files.ca_certs is not None:
            context.verify_mode = ssl.CERT_REQUIRED
        return context


def _load(context: ssl.SSLContext, files: TlsFiles) -> None:
    named = f"--ssl-certfile {files.certfile}" + (f", --ssl-keyfile {files.keyfile}" if files.keyfile else "")
    try:
        context.load_cert_chain(files.certfile, files.keyfile, _no_password)
        if files.ca_certs is not None:
            named = f"--ssl-ca-certs {files.ca_certs}"
            context.load_verify_locations(files.ca_certs)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
        raise StartupError(f"{named}: {reason}") from None


def _no_password() -> str:
    # Else OpenSSL asks for it on the terminal, and the server waits.
    raise ValueError("the key is encrypted; give one without a password")
