"""Raw sockets in the hosts of one machine of the lab: packets are made and read elsewhere, by scapy.

Run as a script with the hosts' network namespaces, NAME=PATH each.  It takes requests from its standard input, one JSON
object a line, answers each with one line, and ends when its input does:

    {"do": "watch"}                                                  forget what came, and keep what comes from now on
    {"do": "send", "host": h, "source": a, "address": a, "packets": [base64, ...]}      SCTP packets, without IP header
    {"do": "collect", "seconds": s}     what came since, after so long at most: [[host, protocol, peer, base64], ...]
                                        protocol is `sctp` or `icmp`; an IPv4 packet has its IP header, IPv6 none
"""

import base64
import ctypes
import json
import os
import selectors
import socket
import sys
import time

CLONE_NEWNET = 0x40000000
KINDS = (
    (socket.AF_INET, socket.IPPROTO_SCTP, "sctp"),
    (socket.AF_INET6, socket.IPPROTO_SCTP, "sctp"),
    (socket.AF_INET, socket.IPPROTO_ICMP, "icmp"),
    (socket.AF_INET6, socket.IPPROTO_ICMPV6, "icmp"),
)


class Wire:
    def __init__(self, namespaces: dict[str, str]) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.namespaces = {name: os.open(path, os.O_RDONLY) for name, path in namespaces.items()}
        self.selector = selectors.DefaultSelector()
        for host in self.namespaces:
            for family, protocol, kind in KINDS:
                self.selector.register(self.open(host, family, protocol), selectors.EVENT_READ, (host, kind))

    def open(self, host: str, family: int, protocol: int) -> socket.socket:
        if self.libc.setns(self.namespaces[host], CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns {host}")
        sock = socket.socket(family, socket.SOCK_RAW, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        sock.setblocking(False)
        return sock

    def send(self, host: str, source: str, address: str, packets: list[str]) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with self.open(host, family, socket.IPPROTO_SCTP) as sock:
            sock.bind((source, 0))
            for packet in packets:
                sock.sendto(base64.b64decode(packet), (address, 0))

    def collect(self, seconds: float) -> list[list[str]]:
        """What came; returned as soon as there is something and then nothing more for a tenth of the time."""
        found: list[list[str]] = []
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            ready = self.selector.select(min(left, seconds / 10) if found else left)
            if not ready:
                break
            for key, _ in ready:
                data, peer = key.fileobj.recvfrom(65536)
                found.append([*key.data, peer[0].partition("%")[0], base64.b64encode(data).decode()])
        return found

    def run(self) -> None:
        for line in sys.stdin:
            request = json.loads(line)
            what = request.pop("do")
            answer = None
            if what == "watch":
                self.collect(0.001)
            elif what == "send":
                self.send(**request)
            else:
                answer = self.collect(**request)
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    Wire(dict(argument.split("=", 1) for argument in sys.argv[1:])).run()
