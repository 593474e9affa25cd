"""Certificates for tests, made by the openssl program: an authority, a server's for 127.0.0.1, a client's."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path
from typing import NamedTuple


class Pair(NamedTuple):
    certificate: Path
    key: Path


class Authority:
    """Signs certificates; its own is `pair.certificate`."""

    def __init__(self, directory: Path, name: str = "authority") -> None:
        self._directory = directory
        self.pair = self._make(name, "-addext", "basicConstraints=critical,CA:true")

    def server(self, *names: str) -> Pair:
        """A server's certificate; names are as openssl writes them, `IP:127.0.0.1` or `DNS:api.test`."""
        return self._sign("server-" + names[0].rpartition(":")[2], "-addext", f"subjectAltName={','.join(names)}")

    def client(self, user: str) -> Pair:
        return self._sign(user)

    def serving(self, pair: Pair, *, ask_clients: bool = False) -> ssl.SSLContext:
        """TLS for a server that asks clients for certificates of this authority, if it is told to."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(self.pair.certificate))
        context.load_cert_chain(pair.certificate, pair.key)
        context.verify_mode = ssl.CERT_OPTIONAL if ask_clients else ssl.CERT_NONE
        return context

    def _sign(self, name: str, *options: str) -> Pair:
        return self._make(name, "-CA", str(self.pair.certificate), "-CAkey", str(self.pair.key), *options)

    def _make(self, name: str, *options: str) -> Pair:
        pair = Pair(self._directory / f"{name}.crt", self._directory / f"{name}.key")
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        where = ["-keyout", str(pair.key), "-out", str(pair.certificate), "-days", "3650", "-subj", f"/CN={name}"]
        subprocess.run([*command, *where, *options], check=True, capture_output=True)
        return pair
