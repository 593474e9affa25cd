"""The stand-in API server beside a test: in a thread, or as a program that kubectl or curl feed by POST, PUT, DELETE.

python tests/fakes/serve_api.py --listen 127.0.0.1:6443 --objects FILE.json [--token TOKEN]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.fakes.apiserver import FakeApiServer


@contextlib.contextmanager
def in_thread(server: FakeApiServer) -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Run the server on an event loop in a thread; yields a function that runs another one on that loop.

    with in_thread(server) as call:
        call(lambda: server.set(service))
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def call(function: Callable[[], Any]) -> Any:
        async def run() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), loop).result(30)

    asyncio.run_coroutine_threadsafe(server.__aenter__(), loop).result(30)
    try:
        yield call
    finally:
        asyncio.run_coroutine_threadsafe(server.__aexit__(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def main() -> None:
    """Serve until interrupted; prints the URL on the first line."""
    parser = argparse.ArgumentParser(description="A stand-in API server for tests")
    parser.add_argument("--listen", default="127.0.0.1:0", metavar="ADDRESS:PORT")
    parser.add_argument("--objects", action="append", default=[], type=Path, help="a JSON object, or a List of them")
    parser.add_argument("--token", action="append", default=[], help="a bearer token that is let in")
    parser.add_argument("--tls-cert", type=Path)
    parser.add_argument("--tls-key", type=Path)
    parser.add_argument("--client-ca", type=Path, help="a client certificate signed by it is let in")
    options = parser.parse_args()
    tls = None
    if options.tls_cert:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=options.client_ca)
        tls.load_cert_chain(options.tls_cert, options.tls_key)
        tls.verify_mode = ssl.CERT_OPTIONAL if options.client_ca else ssl.CERT_NONE
    host, _, port = options.listen.rpartition(":")
    server = FakeApiServer(
        listen=(host.strip("[]"), int(port)),
        tls=tls,
        tokens={token: f"user-{number}" for number, token in enumerate(options.token)},
    )
    for path in options.objects:
        value = json.loads(path.read_text())
        for item in value.get("items", [value]):
            server.store.set(item)

    async def serve() -> None:
        async with server:
            print(server.url, flush=True)  # noqa: T201 - whoever started it reads it
            await asyncio.get_running_loop().create_future()

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve())


if __name__ == "__main__":
    main()
