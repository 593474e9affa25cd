"""The addresses of the node's interfaces, and when they change (DESIGN 4.13)."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections import defaultdict
from collections.abc import Callable, Mapping

from pyroute2 import IPRoute
from pyroute2.netlink import rtnl

from rules.forwarding import Address

SETTLE = 0.05
"""Seconds in which a burst of changes (an interface comes up) is one change."""


def read_addresses() -> Mapping[str, tuple[Address, ...]]:
    """The addresses by interface name, in the order of the interfaces; it blocks.

    They are those of the network namespace of the calling thread.
    """
    found: dict[str, list[Address]] = defaultdict(list)
    with IPRoute() as netlink:
        names = {link["index"]: link.get("ifname") for link in netlink.get_links()}
        for message in netlink.get_addr():
            # A point-to-point address has its own end in IFA_LOCAL.
            text = message.get("local") or message.get("address")
            if text:
                found[names.get(message["index"]) or str(message["index"])].append(ipaddress.ip_address(text).packed)
    return {name: tuple(addresses) for name, addresses in found.items()}


async def watch_addresses(on_change: Callable[[Mapping[str, tuple[Address, ...]]], None]) -> None:
    """Call `on_change` with the addresses whenever one comes or goes, until cancelled."""
    loop = asyncio.get_running_loop()
    changed = asyncio.Event()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE) as events:
        events.bind((0, rtnl.RTMGRP_IPV4_IFADDR | rtnl.RTMGRP_IPV6_IFADDR))
        loop.add_reader(events, _drain, events, changed)
        try:
            last = await asyncio.to_thread(read_addresses)
            on_change(last)
            while True:
                await changed.wait()
                await asyncio.sleep(SETTLE)
                changed.clear()
                addresses = await asyncio.to_thread(read_addresses)
                if addresses != last:
                    last = addresses
                    on_change(addresses)
        finally:
            loop.remove_reader(events)


def _drain(events: socket.socket, changed: asyncio.Event) -> None:
    changed.set()
    try:
        while events.recv(65536):
            pass
    except BlockingIOError:
        pass
    except OSError:  # ENOBUFS: events were lost, which is a change too
        pass
