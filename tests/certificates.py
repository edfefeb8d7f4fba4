"""Certificates for tests, made by the openssl command."""

from __future__ import annotations

import subprocess
from pathlib import Path


def certificate(folder: Path, name: str, *more: str) -> tuple[str, str]:
    """A self-signed certificate for the loopback address and its key, as PEM files."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-days", "2"]
    command += ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    command += ["-keyout", str(key), "-out", str(cert), *(more or ("-nodes",))]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return str(cert), str(key)
