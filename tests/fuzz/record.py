"""What this kernel says of rules and devices of all kinds, for fuzzers to begin with.

`unshare -n python -m tests.fuzz.record` writes `recorded/NAME.txt`: a line of hexadecimal digits for each conversation,
its datagrams joined.  It makes rules in the network namespace that it is started in, which must be an empty one.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from proxy import interfaces
from proxy.explain import legacy, nftables_chains, routing
from proxy.userspace import anyip, sockdiag
from rules.forwarding import Backend, Family, ForwardingTable, Frontend, Kind, Protocol, Route, parse_address
from rules.ipvs.device import Device
from rules.ipvs.services import Ipvs
from rules.netlink import conntrack_events, counters
from rules.netlink.attributes import message, messages
from rules.netlink.conntrack_table import Conntrack
from rules.netlink.ipset import Ipsets
from rules.netlink.listening import Listening
from rules.netlink.transaction import SUBSYSTEM_NFTABLES
from rules.nftables import trace
from rules.nftables.dataplane import NftablesDataplane
from rules.nftables.layout import TABLE

_NEW_RULE = SUBSYSTEM_NFTABLES << 8 | 6
_RULES = 30
WHERE = Path(__file__).with_name("recorded")

_PROGRAM = """
ip link set lo up
ip link add veth0 type veth peer name veth1
ip addr add 192.168.50.10/24 dev veth0
ip addr add fd00:50::10/64 dev veth0 nodad
ip link set veth0 up
ip link set veth1 up
ip link add kube-ipvs0 type dummy
ip addr add 10.96.0.10/32 dev kube-ipvs0
ip addr add fd00:96::10/128 dev kube-ipvs0 nodad
ip route add 10.244.1.0/24 via 192.168.50.11
ip route add blackhole 10.244.9.0/24
ip route add prohibit 10.244.8.0/24
ip route add local 10.96.0.0/12 dev lo proto 77
"""

_IPTABLES = """
-P FORWARD DROP
-N CNI-FORWARD
-N CNI-MORE
-A FORWARD -j CNI-FORWARD
-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -m conntrack ! --ctstate DNAT,INVALID -j DROP
-A FORWARD -m state --state NEW -j LOG
-A CNI-FORWARD -i veth+ ! -o eth0 -p tcp -m tcp --dport 80:90 --tcp-flags SYN,ACK SYN -j DROP
-A CNI-FORWARD -p udp -m udp ! --sport 53 -m comment --comment why -j REJECT
-A CNI-FORWARD -p tcp -m multiport --dports 80,443,8000:8080 -g CNI-MORE
-A CNI-FORWARD -m mark --mark 0x4000/0x4000 -m limit --limit 5/min -j MARK --set-mark 1
-A CNI-FORWARD -m set --match-set blocked src -j DROP
"""
_FOUR = "-A CNI-FORWARD -s 10.244.0.0/16 ! -d 192.168.50.10/32 -f -j DROP\n"
_SIX = "-A CNI-FORWARD -s fd00:244::/48 ! -d fd00:50::10/128 -j RETURN\n"

_NFT = """
table inet firewall {
  set blocked { type ipv4_addr; flags interval; elements = { 10.9.0.0/16, 10.244.1.11 } }
  set ports { type inet_service; flags interval; elements = { 80, 8000-8080 } }
  set states { type ct_state; elements = { new, established } }
  map where { type inet_service : verdict; elements = { 80 : drop } }
  chain forward {
    type filter hook forward priority 0; policy drop;
    ct state established,related accept
    ct state vmap { invalid : drop, new : jump more }
    ct status dnat accept
    iifname "veth*" oifname != "eth0" ip saddr @blocked drop
    tcp dport @ports reject with tcp reset
    meta l4proto { tcp, udp } th dport vmap @where
  }
  chain last {
    reject
  }
  chain more {
    ip daddr 10.244.0.0/16 tcp dport 80-90 counter log prefix "x" drop
    ip6 saddr fd00::/8 udp sport 53 return
    ip daddr & 255.0.255.0 == 10.0.1.0 drop
    tcp flags & (syn | ack) == syn limit rate 5/second meta mark set 0x4000 accept
    meta mark and 0x4000 == 0x4000 ct state @states drop
    fib daddr type local goto last
    numgen random mod 2 == 1 meta nfproto ipv6 tcp dport >= 8000 drop
    ip saddr . tcp dport { 10.0.0.1 . 80 } drop
  }
}
table inet traced {
  chain out {
    type filter hook output priority -400;
    udp dport 7 meta nftrace set 1
  }
  chain nat {
    type nat hook output priority -100;
    udp dport 7 dnat ip to 127.0.0.1:9
  }
}
table ip6 six {
  chain f {
    type filter hook forward priority 0;
    ip6 daddr fd00:244::/48 tcp dport != 443 drop
  }
}
"""

_IPSET = """
create blocked hash:ip family inet
create KUBE-CLUSTER-IP hash:ip,port family inet comment
add KUBE-CLUSTER-IP 10.96.0.10,tcp:53 comment dns
create KUBE-6-CLUSTER-IP hash:ip,port family inet6
add KUBE-6-CLUSTER-IP fd00:96::10,udp:53
create KUBE-LOAD-BALANCER-SOURCE-CIDR hash:ip,port,net family inet
add KUBE-LOAD-BALANCER-SOURCE-CIDR 10.96.0.10,sctp:53,10.0.0.0/8
create KUBE-NODE-PORT-TCP bitmap:port range 0-65535
add KUBE-NODE-PORT-TCP 30080
create KUBE-LOOP-BACK hash:ip,port,ip family inet skbinfo
add KUBE-LOOP-BACK 10.244.1.11,tcp:80,10.244.1.11 skbmark 0x10/0xf0
"""
_IPVSADM = """
-A -t 10.96.0.10:53 -s rr
-a -t 10.96.0.10:53 -r 10.244.1.11:53 -m -w 1
-a -t 10.96.0.10:53 -r 10.244.1.12:53 -m -w 0
-A -u [fd00:96::10]:53 -s sh -p 600
-a -u [fd00:96::10]:53 -r [fd00:244::1]:53 -m
-A -f 7 -s wlc
"""


class _Recorder(socket.socket):
    """A socket that keeps what it hears."""

    heard: bytes = b""

    def recv(self, *arguments: Any) -> bytes:
        data = super().recv(*arguments)
        type(self).heard += data
        return data


@contextlib.contextmanager
def _hearing() -> Iterator[type[_Recorder]]:
    plain, socket.socket = socket.socket, _Recorder  # type: ignore[misc]
    _Recorder.heard = b""
    try:
        yield _Recorder
    finally:
        socket.socket = plain  # type: ignore[misc]


def _heard(function: Callable[[], object]) -> bytes:
    with _hearing() as recorder:
        function()
        return recorder.heard


def _run(*words: str, given: str = "") -> None:
    done = subprocess.run(words, input=given, text=True, capture_output=True, check=False)
    if done.returncode:
        sys.stderr.write(f"{' '.join(words)}: {done.stderr}")


def _make() -> None:
    for line in _PROGRAM.strip().splitlines():
        _run(*line.split())
    _run("ipset", "restore", given=_IPSET)
    for line in _IPVSADM.strip().splitlines():
        _run("ipvsadm", *line.split())
    for program, more in (("iptables", _FOUR), ("ip6tables", _SIX)):
        for kind in ("legacy", "nft"):
            for line in (_IPTABLES + more).strip().splitlines():
                if not (program == "ip6tables" and "blocked" in line):
                    _run(f"{program}-{kind}", *line.split())
    _run("nft", "-f", "-", given=_NFT)


def _legacy(family: Family) -> bytes:
    found: list[bytes] = []
    decode = legacy.decode

    def keep(_: Family, info: bytes, entries: bytes, **more: Any) -> legacy.LegacyTable:
        found.append(info + entries)
        return decode(family, info, entries, **more)

    legacy.decode = keep  # type: ignore[assignment]  # it takes the same
    try:
        legacy.read(family, "filter")
    finally:
        legacy.decode = decode
    return found[0]


def _ipsets() -> None:
    with Ipsets() as sets:
        for name in sorted(sets.names()):
            sets.any_set(name)
            sets.held(name)


def _ipvs() -> None:
    with Ipvs() as ipvs:
        for family in Family:
            ipvs.dump(family)
        ipvs.timeouts()


def _device() -> None:
    with Device("kube-ipvs0") as device:
        for family in Family:
            device.addresses(family)
            device.elsewhere(family)


def _heard_of_ours() -> bytes:
    """Of a small table of ours, which is gone then."""
    frontend, backend = Frontend(bytes([10, 96, 0, 1]), Protocol.TCP, 80), Backend(bytes([10, 244, 1, 1]), 8080)
    routes = {frontend: Route(kind=Kind.CLUSTER_IP, backends=frozenset([backend]), label="ns/web:http")}
    with contextlib.closing(NftablesDataplane(Family.IPV4)) as dataplane:
        dataplane.sync(ForwardingTable(family=Family.IPV4, routes=routes))

    def read() -> None:
        with contextlib.closing(NftablesDataplane(Family.IPV4)) as dataplane:
            dataplane.raw()

    try:
        return _with_few_rules(_heard(read))
    finally:
        _run("nft", "delete", "table", "ip", TABLE)


def _with_few_rules(heard: bytes) -> bytes:
    """Without most of our rules: a fuzzer is to try thousands of inputs a minute."""
    kept = []
    rules = 0
    for each in messages(heard):
        rules += each.kind == _NEW_RULE
        if each.kind != _NEW_RULE or rules < _RULES:
            kept.append(message(each.kind, each.flags, each.payload))
    return b"".join(kept)


def _flows() -> None:
    _send()
    with contextlib.closing(Conntrack(Family.IPV4)) as table:
        list(table.flows(Protocol.UDP))


def _send() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"x", ("127.0.0.2", 7))


def _told(*ears: Listening) -> bytes:
    """What is told of a packet whose destination is translated, and of its flow's end."""
    _send()
    _run("conntrack", "-D", "-p", "udp")
    return b"".join(each for ear in ears for each in ear.datagrams())


def _ways() -> None:
    routing.own_addresses()
    asked = ("10.244.1.11", "10.244.9.1", "10.244.8.1", "10.99.0.1", "fd00:50::11", "fd00:77::1", "1.2.3.4")
    routing.ways_to(map(parse_address, asked))


def main() -> int:
    WHERE.mkdir(exist_ok=True)
    written = _heard_of_ours()
    _make()
    ended = Listening(counters.ROOM, counters._GROUP_DESTROYED)
    (WHERE / "table.txt").write_text(f"{written.hex()}\n")
    conversations: dict[str, list[Callable[[], bytes]]] = {
        "routes": [lambda: _heard(_ways)],
        "chains": [lambda: _heard(lambda: list(nftables_chains.read_chains()))],
        "ipsets": [lambda: _heard(_ipsets)],
        "ipvs": [lambda: _heard(_ipvs)],
        "device": [lambda: _heard(_device)],
        "interfaces": [lambda: _heard(interfaces.read_addresses)],
        "local-routes": [lambda: _heard(lambda: anyip.read_routes(Family.IPV4))],
        "sockets": [lambda: _heard(lambda: sockdiag.read_listeners(Family.IPV4))],
        "flows": [lambda: _heard(_flows)],
        "told": [lambda: _told(trace.listen(), conntrack_events.listen(), ended)],
        "legacy": [lambda: _legacy(Family.IPV4), lambda: _legacy(Family.IPV6)],
    }
    listening = socket.create_server(("127.0.0.1", 0))
    for name, every in conversations.items():
        lines = []
        for each in every:
            try:
                lines.append(each().hex())
            except (OSError, Exception) as error:  # noqa: BLE001  # this kernel has none of it
                sys.stderr.write(f"{name}: {error}\n")
        if lines:
            (WHERE / f"{name}.txt").write_text("\n".join([*lines, ""]))
    listening.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
