"""The IPVS socket and what mode ipvs asks of the node, without a kernel."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable

import pytest

from rules.dataplane import DataplaneError, UnavailableError
from rules.forwarding import Family, Protocol, parse_address
from rules.ipvs.messages import Key, VirtualServer, add_server
from rules.ipvs.node import check_scheduler, sysctls
from rules.ipvs.services import Ipvs, Refused
from rules.netlink.attributes import U32, Message, attribute, attributes, messages, parse_text

FAMILY = 31
"""The number that this kernel gives IPVS."""
GET_FAMILY, GET_SERVER, GET_INFO, NEW_SERVER, DELETE_SERVER = 3, 4, 15, 1, 3
ERROR, DONE = 2, 3


class FakeKernel:
    """The kernel's end of a generic netlink socket, which knows some schedulers."""

    def __init__(self, schedulers: tuple[str, ...] = ("rr",), *, without: int = 0, refuses: int = 0) -> None:
        self.schedulers = schedulers
        self.without, self.refuses = without, refuses
        """Errors: of who asks for the family, and of who asks for anything else."""
        self.servers: list[bytes] = []
        self.commands: list[int] = []
        self.sends: list[int] = []
        self._queue: list[bytes] = []

    def sendto(self, data: bytes, _address: object) -> None:
        requests = list(messages(data))
        self.sends.append(len(requests))
        for request in requests:
            self._take(request)

    def _take(self, request: Message) -> None:
        command = request.payload[0]
        if request.kind != FAMILY:
            assert (request.kind, command) == (16, GET_FAMILY)
            assert parse_text(attributes(request.payload[4:])[2]) == "IPVS"
            self._answer(request, bytes(4) + attribute(1, struct.pack("=H", FAMILY)), error=self.without)
            return
        self.commands.append(command)
        if self.refuses:
            self._answer(request, b"", error=self.refuses)
        elif command == GET_INFO:
            self._answer(request, bytes(4) + attribute(1, U32.pack(0x010201)) + attribute(2, U32.pack(4096)))
        elif command == GET_SERVER:
            for each in self.servers:
                self._answer(request, each)
            self._answer(request, bytes(4), kind=DONE)
        elif command == NEW_SERVER:
            scheduler = parse_text(attributes(attributes(request.payload[4:])[1])[6])
            if scheduler not in self.schedulers:
                self._answer(request, b"", error=errno.ENOENT)
            else:
                self.servers.append(request.payload)
        elif command == DELETE_SERVER:
            self.servers.pop()

    def _answer(self, request: Message, payload: bytes, kind: int = FAMILY, error: int = 0) -> None:
        if error:
            kind, payload = ERROR, struct.pack("=i", -error) + bytes(16)
        self._queue.append(struct.pack("=IHHII", 16 + len(payload), kind, 0, request.sequence, 0) + payload)

    def recv(self, _size: int, _flags: int = 0) -> bytes:
        if not self._queue:
            raise BlockingIOError
        return self._queue.pop(0)

    def setsockopt(self, *_: object) -> None: ...

    def bind(self, _address: object) -> None: ...

    def close(self) -> None: ...


Open = Callable[[FakeKernel], Ipvs]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Open:
    def opened(kernel: FakeKernel) -> Ipvs:
        monkeypatch.setattr(socket, "socket", lambda *_: kernel)
        return Ipvs()

    return opened


WEB = VirtualServer(Key(Family.IPV4, Protocol.TCP, parse_address("10.96.0.1"), 80))


def test_opening_asks_for_the_family_and_what_it_is(opened: Open) -> None:
    kernel = FakeKernel()
    opened(kernel)
    assert kernel.commands == [GET_INFO]


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (FakeKernel(without=errno.ENOENT), r"this kernel has no IPVS: load its module \(modprobe ip_vs\)"),
        (FakeKernel(refuses=errno.EPERM), "IPVS may not be used: CAP_NET_ADMIN of the host is needed"),
        (FakeKernel(refuses=errno.EIO), "IPVS doesn't answer"),
    ],
)
def test_a_kernel_without_ipvs_is_one_line(opened: Open, kernel: FakeKernel, said: str) -> None:
    with pytest.raises(UnavailableError, match=said) as raised:
        opened(kernel)
    assert "\n" not in str(raised.value)


def test_large_batches_go_in_several_sends_and_refusals_keep_their_places(opened: Open) -> None:
    kernel = FakeKernel()
    ipvs = opened(kernel)
    kernel.sends.clear()
    bad = WEB._replace(scheduler="magic")
    requests = [add_server(bad if place in (0, 399, 400, 999) else WEB) for place in range(1000)]
    assert ipvs.send(requests) == [Refused(place, errno.ENOENT) for place in (0, 399, 400, 999)]
    assert kernel.sends == [400, 400, 200]
    assert len(kernel.servers) == 996
    assert ipvs.send([]) == []


def test_nothing_that_fails_is_silent(opened: Open) -> None:
    kernel = FakeKernel()
    ipvs = opened(kernel)
    kernel.refuses = errno.EIO
    for call, said in (
        (ipvs.servers, "IPVS' virtual servers could not be read"),
        (lambda: ipvs.reals(WEB.key), "IPVS' real servers could not be read"),
        (ipvs.timeouts, "IPVS' timeouts could not be read"),
    ):
        with pytest.raises(DataplaneError, match=said):
            call()


# --- the node ------------------------------------------------------------------------------------------------


def test_a_scheduler_is_tried_and_leaves_nothing(opened: Open) -> None:
    kernel = FakeKernel(("rr", "mh"))
    check_scheduler(opened(kernel), "mh")
    assert kernel.commands[1:] == [GET_SERVER, NEW_SERVER, GET_SERVER, DELETE_SERVER]
    assert kernel.servers == []


def test_a_scheduler_that_somebody_uses_is_not_tried(opened: Open) -> None:
    kernel = FakeKernel()
    kernel.servers.append(add_server(WEB))
    check_scheduler(opened(kernel), "rr")
    assert kernel.commands[1:] == [GET_SERVER]


@pytest.mark.parametrize("scheduler", ["magic", "none"])
def test_a_scheduler_that_isnt_there_is_named(opened: Open, scheduler: str) -> None:
    kernel = FakeKernel(("rr", "none"))
    with pytest.raises(UnavailableError, match=f"this kernel has no IPVS scheduler {scheduler}"):
        check_scheduler(opened(kernel), scheduler)
    assert kernel.servers == []


def test_a_kernel_that_accepts_servers_and_shows_none_is_not_used(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    ipvs = opened(FakeKernel())
    monkeypatch.setattr(ipvs, "servers", list)
    with pytest.raises(UnavailableError, match="does not show it"):
        check_scheduler(ipvs, "rr")


@pytest.mark.parametrize(
    ("release", "has"),
    [
        ("4.0.9", False),
        ("4.1.0", True),
        ("4.19.0-26-amd64", True),
        ("5.8.18", True),
        ("5.9.0", False),
        ("6.1.0-56", False),
    ],
)
def test_reuse_is_switched_off_only_where_it_delays(release: str, has: bool) -> None:
    assert ("net/ipv4/vs/conn_reuse_mode" in sysctls(strict_arp=False, release=release)) is has


def test_strict_arp_is_asked_for_alone() -> None:
    plain = sysctls(strict_arp=False, release="6.1.0")
    strict = sysctls(strict_arp=True, release="6.1.0")
    assert plain["net/ipv4/vs/conntrack"] == 1
    assert {name: value for name, value in strict.items() if name not in plain} == {
        "net/ipv4/conf/all/arp_ignore": 1,
        "net/ipv4/conf/all/arp_announce": 2,
    }
