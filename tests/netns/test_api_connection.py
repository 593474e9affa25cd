"""The connection to an API server that is gone without a word: its machine has no power, or its address has moved."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess

import pytest

from proxy.sources import transport
from proxy.sources.credentials import Credentials, Keyring
from proxy.sources.transport import Client, SilentError, UnreachableError
from tests.fakes.apiserver import FakeApiServer
from tests.netns.isolation import own_network_namespace
from tests.netns.patience import TIME_SCALE


def ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True)


def test_a_watch_whose_server_is_gone_without_a_word_ends_by_the_kernels_own_probes(
    root: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "PROBE_AFTER", 1)
    monkeypatch.setattr(transport, "PROBE_EVERY", 1)
    monkeypatch.setattr(transport, "PROBES", 2)

    async def watch() -> None:
        async with FakeApiServer(bookmark_every=0) as server:
            credentials = Credentials(server=server.url)

            async def same() -> Credentials:
                return credentials

            async with Client(Keyring(credentials, same)) as client:
                chunks = client.stream(
                    "/api/v1/services", {"watch": "true"}, answer=20, silence=lambda: 40 * TIME_SCALE
                )
                async with contextlib.aclosing(chunks):
                    assert await anext(chunks) == b""
                    ip("link set lo down")
                    with pytest.raises(UnreachableError) as gone:
                        await anext(chunks)
                    assert not isinstance(gone.value, SilentError)

    with own_network_namespace():
        ip("link set lo up")
        asyncio.run(watch())
