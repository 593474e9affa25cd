"""Following the addresses of interfaces on a node that is short of something."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Mapping

import pytest
import structlog.testing

from proxy import interfaces
from rules.forwarding import Address, parse_address
from rules.netlink.attributes import DecodeError
from tests.fakes.polling import eventually

ADDRESSES = {"one": (parse_address("192.0.2.1"),)}


@pytest.mark.parametrize(
    "trouble",
    [
        OSError(errno.EMFILE, os.strerror(errno.EMFILE)),
        OSError(errno.EINTR, "the interfaces changed again and again while they were read"),
        DecodeError("a message of rtnetlink without its header"),
    ],
    ids=["no descriptor", "restless", "nonsense"],
)
def test_addresses_that_cannot_be_read_are_read_later_and_told_of_once(
    trouble: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [trouble] * 3

    def read() -> Mapping[str, tuple[Address, ...]]:
        if failures:
            raise failures.pop()
        return ADDRESSES

    monkeypatch.setattr(interfaces, "read_addresses", read)
    monkeypatch.setattr(interfaces, "RETRY", 0.001)
    told: list[Mapping[str, tuple[Address, ...]]] = []

    async def follow() -> None:
        watching = asyncio.create_task(interfaces.watch_addresses(told.append))
        await eventually(lambda: told or watching.done())
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)

    with structlog.testing.capture_logs() as logs:
        asyncio.run(follow())
    assert told == [ADDRESSES]
    [complaint] = [each for each in logs if each["log_level"] == "warning"]
    assert str(trouble.args[-1]) in complaint["reason"]
