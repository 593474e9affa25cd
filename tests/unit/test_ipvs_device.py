"""The dummy device, without a kernel: what is asked for, and what kernels that lack something are told to lack."""

from __future__ import annotations

import errno
import socket
import struct

import pytest

from rules.dataplane import DataplaneError, UnavailableError
from rules.forwarding import Family, parse_address
from rules.ipvs.device import Device
from rules.netlink.attributes import Message, attribute, attributes, messages, nested, parse_text, text

NEW_LINK, GET_LINK, NEW_ADDRESS, GET_ADDRESS = 16, 18, 20, 22
ERROR, DONE = 2, 3
INDEX = 7
VIP, VIP6 = parse_address("10.96.0.1"), parse_address("fd00::1")


class FakeKernel:
    """The kernel's end of a routing socket, with or without the device."""

    def __init__(self, *, there: bool = True, refuses: dict[int, int] | None = None) -> None:
        self.there = there
        self.refuses = refuses or {}
        """Errors by kind of request."""
        self.requests: list[Message] = []
        self._queue: list[bytes] = []

    def sendto(self, data: bytes, _address: object) -> None:
        for request in messages(data):
            self.requests.append(request)
            self._take(request)

    def _take(self, request: Message) -> None:
        error = self.refuses.get(request.kind, 0)
        if request.kind == GET_LINK and not self.there:
            error = errno.ENODEV
        if error or request.kind not in (GET_LINK, GET_ADDRESS):
            self._answer(request, ERROR, struct.pack("=i", -error) + bytes(16))
        elif request.kind == GET_LINK:
            link = struct.pack("=BxHiII", 0, 1, INDEX, 0, 0) + nested(18, text(1, "dummy"))
            self._answer(request, NEW_LINK, link)
        else:
            for index, address in ((1, parse_address("127.0.0.1")), (INDEX, VIP)):
                said = struct.pack("=BBBBi", socket.AF_INET, 32, 0, 254, index) + attribute(2, address)
                self._answer(request, NEW_ADDRESS, said)
            self._answer(request, DONE, bytes(4))

    def _answer(self, request: Message, kind: int, payload: bytes) -> None:
        self._queue.append(struct.pack("=IHHII", 16 + len(payload), kind, 0, request.sequence, 0) + payload)

    def recv(self, _size: int, _flags: int = 0) -> bytes:
        if not self._queue:
            raise BlockingIOError
        return self._queue.pop(0)

    def setsockopt(self, *_: object) -> None: ...

    def bind(self, _address: object) -> None: ...

    def close(self) -> None: ...


def opened(monkeypatch: pytest.MonkeyPatch, kernel: FakeKernel) -> Device:
    monkeypatch.setattr(socket, "socket", lambda *_: kernel)
    return Device()


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (errno.EOPNOTSUPP, UnavailableError, "this kernel has no dummy devices: load the module dummy"),
        (errno.EPERM, UnavailableError, "device sluice-ipvs could not be made: CAP_NET_ADMIN is needed"),
        (errno.ENOMEM, DataplaneError, "device sluice-ipvs could not be made: Cannot allocate memory"),
    ],
)
def test_what_the_kernel_lacks_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: int, kind: type[Exception], said: str
) -> None:
    with pytest.raises(DataplaneError, match=said) as raised:
        opened(monkeypatch, FakeKernel(there=False, refuses={NEW_LINK: error})).ensure()
    assert raised.type is kind


def test_addresses_are_for_being_reached_and_not_for_being_used(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = FakeKernel()
    assert opened(monkeypatch, kernel).add([VIP, VIP6]) == {}
    ipv4, ipv6 = (each.payload for each in kernel.requests if each.kind == NEW_ADDRESS)
    scope_host = 254
    assert struct.unpack_from("=BBBBi", ipv4) == (socket.AF_INET, 32, 0, scope_host, INDEX)
    assert attributes(ipv4[8:]) == {1: VIP, 2: VIP}
    assert struct.unpack_from("=BBBBi", ipv6) == (socket.AF_INET6, 128, 0, 0, INDEX)
    found = attributes(ipv6[8:])
    assert found[2] == VIP6
    preferred, valid, _, _ = struct.unpack("=4I", found[6])
    assert (preferred, valid) == (0, 0xFFFFFFFF)


def test_many_addresses_are_one_send_and_one_question_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = FakeKernel()
    opened(monkeypatch, kernel).add((10 << 24 | number).to_bytes(4) for number in range(500))
    assert [each.kind for each in kernel.requests] == [GET_LINK, *[NEW_ADDRESS] * 500]
    assert parse_text(attributes(kernel.requests[0].payload[16:])[3]) == "sluice-ipvs"


def test_the_devices_own_addresses_and_those_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    device = opened(monkeypatch, FakeKernel())
    assert device.addresses(Family.IPV4) == {VIP}
    assert device.elsewhere(Family.IPV4) == {parse_address("127.0.0.1")}
    without = opened(monkeypatch, FakeKernel(there=False))
    assert without.addresses(Family.IPV4) == frozenset()
    assert without.elsewhere(Family.IPV4) == {VIP, parse_address("127.0.0.1")}
