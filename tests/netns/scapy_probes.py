"""Probes and captures where a header must be seen, and SCTP, for which a kernel need not have sockets.

Everything is sent and received through raw sockets inside the hosts; scapy builds and reads the packets.  It is GPL,
so that only tests import it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import random
import selectors
import socket
import time
from collections.abc import Iterator
from typing import Any

from scapy.layers.inet import IP
from scapy.layers.inet6 import ICMPv6DestUnreach
from scapy.layers.l2 import Ether
from scapy.layers.sctp import SCTP, SCTPChunkInit
from scapy.packet import Packet

from proxy.demo import plan
from proxy.demo.probes import Outcome, Probe
from proxy.demo.world import World

_ETH_P_ALL = 3


class Capture:
    """The packets that pass an interface of a host, from the `with` statement on."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self.packets: list[Packet] = []

    def until(self, layer: type[Packet], timeout: float = 3.0, **fields: Any) -> Packet:
        """The first packet with a layer whose fields have these values.

        Raises:
            AssertionError: none passed within the time; the message lists what did.
        """
        deadline = time.monotonic() + timeout
        position = 0
        while True:
            for packet in self.packets[position:]:
                position += 1
                if layer in packet and all(packet[layer].getfieldval(name) == fields[name] for name in fields):
                    return packet
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                self.packets.append(Ether(self._socket.recv(65536)))
            except TimeoutError:
                seen = "\n".join(packet.summary() for packet in self.packets)
                raise AssertionError(f"no {layer.__name__} with {fields} passed; seen:\n{seen}") from None


@contextlib.contextmanager
def capture(world: World, host: str, interface: str = "eth0") -> Iterator[Capture]:
    """What passes an interface inside a host."""

    def inside() -> socket.socket:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
        sock.bind((interface, 0))
        return sock

    sock = world.namespaces[host].inside(inside)
    try:
        yield Capture(sock)
    finally:
        sock.close()


def probe_sctp(world: World, probe: Probe) -> list[Outcome]:
    """Send SCTP INITs and see where each arrives, in the same terms as a connection.

    "Answered" means that the INIT arrived at a host, under the address and port that it then had.
    """
    v6 = ":" in probe.address
    family = socket.AF_INET6 if v6 else socket.AF_INET
    own = plan.HOSTS[probe.host].ipv6 if v6 else plan.HOSTS[probe.host].ipv4
    source = probe.source or own[0]
    began = time.monotonic()
    attempts: dict[int, tuple[str, int]] = {}
    outcomes: list[Outcome] = []
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:

        def listen(host: str, protocol: int) -> socket.socket:
            def inside() -> socket.socket:
                sock = socket.socket(family, socket.SOCK_RAW, protocol)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
                return sock

            return stack.enter_context(world.namespaces[host].inside(inside))

        for host in plan.HOSTS:
            if host != probe.host or any(host == each.name for each in plan.PODS):
                selector.register(listen(host, socket.IPPROTO_SCTP), selectors.EVENT_READ, host)
        errors = listen(probe.host, socket.IPPROTO_ICMPV6 if v6 else socket.IPPROTO_ICMP)
        selector.register(errors, selectors.EVENT_READ, "")
        sender = listen(probe.host, socket.IPPROTO_SCTP)
        sender.bind((source, 0))
        for _ in range(probe.count):
            tag = random.getrandbits(32) | 1  # zero is no tag
            port = probe.source_port or random.randrange(20000, 60000)
            attempts[tag] = (source, port)
            sender.sendto(sctp_init(tag, port, probe.port), (probe.address, 0))

        deadline = began + probe.timeout
        while attempts and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                data, ancillary = key.fileobj.recvfrom(65536)  # type: ignore[union-attr]  # all of them are sockets
                peer = ancillary[0].partition("%")[0]
                outcome = read_error(data, peer, v6, attempts) if key.fileobj is errors else None
                if key.data:
                    outcome = read_arrival(key.data, data, peer, v6, attempts)
                if outcome:
                    outcomes.append(outcome_of(outcome, began))
    silent = [Outcome(kind="silent", began=began, seconds=probe.timeout) for _ in attempts]
    return outcomes + silent


def sctp_init(tag: int, source_port: int, port: int) -> bytes:
    """A packet that asks for an association, without its IP header."""
    chunk = SCTPChunkInit(init_tag=tag, a_rwnd=65536, n_out_streams=1, n_in_streams=1)
    return bytes(SCTP(sport=source_port, dport=port, tag=0) / chunk)


def outcome_of(fields: dict[str, Any], began: float) -> Outcome:
    return Outcome(began=began, seconds=time.monotonic() - began, **fields)


def read_arrival(
    host: str, data: bytes, peer: str, v6: bool, attempts: dict[int, tuple[str, int]]
) -> dict[str, Any] | None:
    """An INIT that arrived at a host."""
    # A raw IPv6 socket gives no IP header, so that the address it was sent to is that of the host.
    packet = SCTP(data) if v6 else IP(data)
    if SCTPChunkInit not in packet:
        return None
    local = attempts.pop(packet[SCTPChunkInit].init_tag, None)
    if local is None:
        return None
    address = plan.HOSTS[host].ipv6[0] if v6 else packet[IP].dst
    return {
        "kind": "answered",
        "host": host,
        "address": address,
        "port": packet[SCTP].dport,
        "peer": (peer, packet[SCTP].sport),
        "local": local,
    }


def read_error(data: bytes, sender: str, v6: bool, attempts: dict[int, tuple[str, int]]) -> dict[str, Any] | None:
    """An ICMP error about one of the INITs."""
    if v6:
        if data[0] != 1:
            return None
        message = ICMPv6DestUnreach(data)
        kind, code, quoted = message.type, message.code, bytes(message.payload)[40:]
    else:
        packet = IP(data)
        if packet.payload.type != 3:
            return None
        kind, code = packet.payload.type, packet.payload.code
        inner = bytes(packet.payload)[8:]
        quoted = inner[(inner[0] & 15) * 4 :]
    port = int.from_bytes(quoted[:2])
    for tag, local in attempts.items():
        if local[1] == port:
            del attempts[tag]
            return {"kind": "icmp", "icmp": (kind, code), "sender": str(ipaddress.ip_address(sender))}
    return None
