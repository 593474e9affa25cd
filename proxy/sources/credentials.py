"""Credentials for the API server: where they come from, how long they hold, and TLS made from them.

A short-lived child (`credentials_child.py`) reads the kubeconfig or the service account, runs exec plugins, and hands
over values; the agent never imports the `kubernetes` package.  A `Keyring` holds the current values and runs the child
again when they are about to expire, when a file they came from has changed, and when the server refuses them.

Nothing secret shows in a repr, a log or an error: `Credentials` prints its secrets as `***`, and the child's refusals
quote nothing of the files.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import tempfile
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import msgspec

from proxy.sources.credentials_reading import SERVICE_ACCOUNT, Reading

READ_TIMEOUT = 45.0
"""Seconds for the child, exec plugin included: some of them ask a distant service.  Less than a request has that needs
the credentials (`Settings.answer`): else it would only be known that there was no answer, and not whose."""

RENEW_PAUSE = 10.0
"""Least seconds between two runs of the child, so that a server which refuses everything costs no storm of plugins."""

LOOK_EVERY = 60.0
"""Seconds between two looks at the files that credentials came from."""

MOST_AHEAD = 300.0
"""Renew at most so many seconds before the expiry; of a shorter life, when a fifth of it is left."""


class CredentialsError(Exception):
    """There are no usable credentials; the message is one line that says why and what to do, without secrets."""


class Credentials(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What it takes to talk to an API server."""

    server: str
    authorization: str = ""
    """The value of the Authorization header, scheme included."""
    expires: float | None = None
    """When the token or the plugin's certificate ends (seconds since 1970), where that is known."""
    ca: str = ""
    """PEM certificates that may sign the server's; empty: those of the system."""
    certificate: str = ""
    key: str = ""
    tls_server_name: str = ""
    insecure: bool = False
    proxy_url: str = ""
    files: tuple[str, ...] = ()
    """What was read: a change of one of them asks for another read."""

    def __repr__(self) -> str:
        shown = {"server": self.server, "ca": bool(self.ca), "insecure": self.insecure, "expires": self.expires}
        hidden = {name: "***" for name in ("authorization", "certificate", "key", "proxy_url") if getattr(self, name)}
        return f"Credentials({', '.join(f'{name}={value!r}' for name, value in {**shown, **hidden}.items())})"

    def ssl_context(self) -> ssl.SSLContext | None:
        """TLS as these credentials want it; None for a server without TLS.

        Raises:
            CredentialsError: certificates or key are no PEM, or don't belong together.
        """
        if not self.server.startswith("https://"):
            return None
        try:
            context = ssl.create_default_context(cadata=self.ca or None)
        except (ssl.SSLError, ValueError):
            raise CredentialsError(f"{self.server}: the certificate authority is no PEM certificate") from None
        # Clusters live for years on authorities without the extensions that Python 3.13 and later insist on.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        if self.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if self.certificate:
            try:
                with _file_of(f"{self.certificate.rstrip()}\n{self.key}".encode()) as path:
                    # An encrypted key must not make OpenSSL ask on a terminal.
                    context.load_cert_chain(path, password=lambda: b"")
            except (ssl.SSLError, ValueError):
                raise CredentialsError(
                    f"{self.server}: the client certificate and its key cannot be used together",
                ) from None
        return context


@contextlib.contextmanager
def _file_of(data: bytes) -> Iterator[str]:
    """A path to read `data` from, for OpenSSL, which takes keys from files only: memory, or a file of mode 0600."""
    with os.fdopen(os.memfd_create("sluice-key"), "wb") as memory:
        path = f"/proc/self/fd/{memory.fileno()}"
        if Path(path).exists():
            memory.write(data)
            memory.flush()
            yield path
            return
    with tempfile.NamedTemporaryFile(prefix="sluice-") as file:  # no /proc
        file.write(data)
        file.flush()
        yield file.name


class _Refusal(msgspec.Struct):
    error: str


_ANSWER = msgspec.json.Decoder(Credentials)
_REFUSAL = msgspec.json.Decoder(_Refusal)


async def load(
    kubeconfig: str,
    master: str,
    *,
    service_account: str = SERVICE_ACCOUNT,
    read_timeout: float = READ_TIMEOUT,
) -> Credentials:
    """Credentials from a kubeconfig, or of the pod that this runs in when both names are empty (CFG-15).

    `master` replaces the kubeconfig's server; alone it is a server that asks for no credentials.

    Raises:
        CredentialsError: there are none; for example the file is missing, or its exec plugin failed.
    """
    return await read(
        Reading(kubeconfig, master, service_account=service_account), kubeconfig, read_timeout=read_timeout
    )


async def read(reading: Reading, kubeconfig: str, *, read_timeout: float = READ_TIMEOUT) -> Credentials:
    """Credentials from a child that was started already, for the kubeconfig of that name.

    Raises:
        CredentialsError: as `load` does.
    """
    try:
        out, status = await reading.answer(read_timeout)
    except TimeoutError:
        what = f"kubeconfig {kubeconfig}: its exec plugin" if kubeconfig else "reading the credentials"
        raise CredentialsError(f"{what} took more than {read_timeout:g} s") from None
    return accept(out, status)


def accept(answer: bytes, status: int | None = 0) -> Credentials:
    """Credentials from the child's answer, checked to be usable.

    Raises:
        CredentialsError: it is a refusal, or what it holds cannot be used.
    """
    try:
        credentials = _ANSWER.decode(answer)
    except ValueError:
        try:
            refusal = _REFUSAL.decode(answer).error
        except ValueError:
            refusal = f"the credentials helper ended with status {status} and no answer"
        raise CredentialsError(refusal) from None
    _check(credentials)
    return credentials


def _check(credentials: Credentials) -> None:
    if not _is_address(credentials.server):
        raise CredentialsError(f"server {credentials.server!r}: not an http or https address")
    if credentials.proxy_url and not _is_address(credentials.proxy_url):
        raise CredentialsError(f"{credentials.server}: its proxy is neither an http nor an https address")
    if not credentials.authorization.isprintable():
        raise CredentialsError(f"{credentials.server}: the token holds characters that no token has")
    credentials.ssl_context()


def _is_address(text: str) -> bool:
    """Whether a server can be asked there."""
    try:
        url = urllib.parse.urlsplit(text)
        return url.scheme in {"http", "https"} and bool(url.hostname) and url.port != 0
    except ValueError:  # a host in half a pair of brackets, a port that is none
        return False


class Keyring:
    """The credentials in use, renewed when they must be.

    `load` runs at most once per `RENEW_PAUSE` and never twice at a time.  While it fails, the old credentials stay in
    use (they may still be good) and `trouble` says why.
    """

    def __init__(
        self,
        credentials: Credentials,
        load: Callable[[], Awaitable[Credentials]],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._credentials = credentials
        self._load = load
        self._clock = clock
        self._lock = asyncio.Lock()
        self._stamps = _stamps(credentials.files)
        self._tried = self._looked = self._loaded = clock()
        self.trouble: str | None = None
        """Why the last renewal failed, in one line."""

    @property
    def server(self) -> str:
        return self._credentials.server

    async def current(self) -> Credentials:
        """The credentials to use now, renewed first if they are about to expire or their files have changed."""
        # While somebody else renews them, the old ones would only be refused.
        if self._due() or self._lock.locked():
            await self._renew(self._credentials)
        return self._credentials

    async def refused(self, used: Credentials) -> Credentials:
        """The server refused `used`: other credentials if there are any, else the same again."""
        if self._credentials is used:
            await self._renew(used)
        return self._credentials

    def _due(self) -> bool:
        now = self._clock()
        expires = self._credentials.expires
        if expires is not None and now >= expires - min(MOST_AHEAD, (expires - self._loaded) / 5):
            return True
        # A clock set back must not stop the looking.
        if 0 <= now - self._looked < LOOK_EVERY:
            return False
        self._looked = now
        return _stamps(self._credentials.files) != self._stamps

    async def _renew(self, used: Credentials) -> None:
        async with self._lock:
            now = self._clock()
            if self._credentials is not used or 0 <= now - self._tried < RENEW_PAUSE:
                return
            self._tried = now
            # Before the read: a change during it is seen at the next look.
            stamps = _stamps(used.files)
            try:
                fresh = await self._load()
            except CredentialsError as error:
                self.trouble = str(error)
                return
            self.trouble = None
            self._stamps = stamps if fresh.files == used.files else _stamps(fresh.files)
            self._loaded = now
            # An equal answer stays the same object: `refused` can tell that there is nothing new to try.
            self._credentials = fresh if fresh != used else used


def _stamps(files: tuple[str, ...]) -> tuple[tuple[int, int, int] | None, ...]:
    """What tells that a file was replaced or rewritten, through symlinks, as mounted secrets are."""

    def stamp(file: str) -> tuple[int, int, int] | None:
        try:
            found = os.stat(file)  # noqa: PTH116 - a Path for each look would say no more
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    return tuple(map(stamp, files))
