"""The static part in a real kernel, beside what the nft program makes of the same text.

Each test has network namespaces of its own, which are removed whatever happens.
"""

import ctypes
import errno
import itertools
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from rules.forwarding import (
    Family,
    InputInterface,
    InputInterfacePrefix,
    NodeFacts,
    SourcePrefix,
    format_address,
    parse_address,
    parse_prefix,
)
from rules.netlink.errors import NetlinkError, StaleGenerationError, TransactionError
from rules.netlink.transaction import NetfilterSocket
from rules.nftables import names
from rules.nftables.adopt import facts_of
from rules.nftables.layout import COMMON_COUNTS, TABLE, build
from rules.nftables.messages import Element, add_elements, delete_elements, flush_elements, key_at
from rules.nftables.objects import decode_rule, delete_rule, list_rules
from rules.nftables.replace import (
    messages_to_create,
    messages_to_delete,
    messages_to_recreate,
    messages_to_replace,
)
from rules.nftables.sets import prefix_elements
from rules.nftables.state import read_elements, read_static, state_of

pytestmark = pytest.mark.netns

IPV4, IPV6 = Family.IPV4, Family.IPV6
FAMILIES = pytest.mark.parametrize("family", list(Family), ids=lambda family: family.label)
WORD = {IPV4: "ip", IPV6: "ip6"}
CLONE_NEWNET = 0x40000000


class Namespace:
    """A network namespace with a netfilter socket in it."""

    def __init__(self, name):
        self.name = name
        subprocess.run(["ip", "netns", "add", name], check=True, capture_output=True)
        try:
            self.socket = self._socket_inside()
        except BaseException:
            self.close()
            raise

    def _socket_inside(self):
        made = []

        def work():
            # Only this thread moves; the socket stays where it was made.
            with Path("/run/netns", self.name).open() as handle:
                libc = ctypes.CDLL(None, use_errno=True)
                if libc.setns(handle.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), f"cannot enter {self.name}")
            made.append(NetfilterSocket())

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return made[0]

    def _inside(self, *command):
        return ["ip", "netns", "exec", self.name, *command]

    def nft(self, text):
        done = subprocess.run(
            self._inside("nft", "-f", "-"),
            input=text,
            text=True,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[:2000]

    def listing(self):
        done = subprocess.run(self._inside("nft", "list", "ruleset"), text=True, capture_output=True, check=True)
        return done.stdout

    def close(self):
        if hasattr(self, "socket"):
            self.socket.close()
        subprocess.run(["ip", "netns", "del", self.name], check=False, capture_output=True)


@pytest.fixture
def namespace():
    """Makes namespaces for a test."""
    if os.geteuid() != 0:
        pytest.skip("needs root: network namespaces")
    for program in ("ip", "nft"):
        if shutil.which(program) is None:
            pytest.skip(f"needs the program {program}")
    made = []

    def make():
        made.append(Namespace(f"sluice-wire-{os.getpid()}-{len(made)}"))
        return made[-1]

    yield make
    for each in made:
        each.close()


# --- the same layout as text -----------------------------------------------------------------------------------

SETS = """
  map cluster-ip {{ type {address} . inet_proto . inet_service : classid; }}
  map external {{ type {address} . inet_proto . inet_service : classid; }}
  map external-local {{ type {address} . inet_proto . inet_service : classid; }}
  set external-policy-local {{ type {address} . inet_proto . inet_service; }}
  set external-ips {{ type {address} . inet_proto . inet_service; }}
  set load-balancer-ips {{ type {address} . inet_proto . inet_service; }}
  map node-port {{ type inet_proto . inet_service : classid; }}
  map node-port-local {{ type inet_proto . inet_service : classid; }}
  set node-port-policy-local {{ type inet_proto . inet_service; }}
  set node-port-addresses {{ type {address}; {addresses} }}
  map endpoints-tcp {{ typeof meta priority . numgen random mod 2 : {ip} daddr . tcp dport; }}
  map endpoints-udp {{ typeof meta priority . numgen random mod 2 : {ip} daddr . udp dport; }}
  map endpoints-sctp {{ typeof meta priority . numgen random mod 2 : {ip} daddr . sctp dport; }}
  map members {{ typeof meta priority . numgen random mod 2 : meta priority; }}
  map slots {{ type classid : {address} . inet_service; }}
  map sticky {{
    typeof meta priority . numgen random mod 2 : meta priority; size 1048576; flags dynamic,timeout; timeout 3h;
  }}
  set local-endpoint-pairs {{ type {address} . {address} . inet_proto . inet_service; }}
  set cluster-ips {{ type {address}; }}
  set service-cidrs {{ type {address}; flags interval; {cidrs} }}
  set reject-frontends {{ type {address} . inet_proto . inet_service; }}
  set drop-frontends {{ type {address} . inet_proto . inet_service; }}
  set reject-node-ports {{ type inet_proto . inet_service; }}
  set drop-node-ports {{ type inet_proto . inet_service; }}
  set source-ranged {{ type {address} . inet_proto . inet_service; }}
  map pick {{ type classid : verdict; }}
"""

PICK = """
  chain pick-{n} {{
    meta priority set meta priority and ffff:e000
    meta l4proto tcp dnat {ip} to meta priority . numgen random mod {n} map @endpoints-tcp
    meta l4proto udp dnat {ip} to meta priority . numgen random mod {n} map @endpoints-udp
    meta l4proto sctp dnat {ip} to meta priority . numgen random mod {n} map @endpoints-sctp
    jump sticky-read
    meta priority set meta priority . numgen random mod {n} map @members goto to-slot
  }}
"""

CHAINS = """
  chain dispatch {{ meta priority and 0:1fff vmap @pick; }}
  chain sticky-read {{
    meta priority set meta priority . jhash {ip} saddr mod 4294967295 seed 0x5bd1e995 map @sticky jump to-slot
    meta priority set meta priority and ffff:e000
    delete @sticky {{ meta priority . jhash {ip} saddr mod 4294967295 seed 0x5bd1e995 : meta priority }}
  }}
  chain to-slot {{
    meta l4proto tcp dnat {ip} to meta priority map @slots
    meta l4proto udp dnat {ip} to meta priority map @slots
    meta l4proto sctp dnat {ip} to meta priority map @slots
  }}
  chain remember {{
    {remember}
  }}
  chain after-dnat {{ jump remember; meta priority set none; }}
  chain services {{
    meta priority set {ip} daddr . meta l4proto . th dport map @cluster-ip goto internal
    {ip} daddr . meta l4proto . th dport @external-policy-local goto external-policy-local
    meta priority set {ip} daddr . meta l4proto . th dport map @external goto mark-for-masquerade
    goto node-port-gate
  }}
  chain internal {{
    {internal}
  }}
  chain node-port-gate {{
    {gate}
  }}
  chain node-ports {{
    meta l4proto . th dport @node-port-policy-local goto node-ports-policy-local
    meta priority set meta l4proto . th dport map @node-port goto mark-for-masquerade
  }}
  chain external-policy-local {{
    {external_pods}
    fib saddr type local goto external-all-masqueraded
    goto external-here
  }}
  chain external-all {{ meta priority set {ip} daddr . meta l4proto . th dport map @external goto dispatch; }}
  chain external-all-masqueraded {{
    meta priority set {ip} daddr . meta l4proto . th dport map @external goto mark-for-masquerade
  }}
  chain external-here {{ meta priority set {ip} daddr . meta l4proto . th dport map @external-local goto dispatch; }}
  chain node-ports-policy-local {{
    {node_port_pods}
    fib saddr type local goto node-port-all-masqueraded
    goto node-port-here
  }}
  chain node-port-all {{ meta priority set meta l4proto . th dport map @node-port goto dispatch; }}
  chain node-port-all-masqueraded {{
    meta priority set meta l4proto . th dport map @node-port goto mark-for-masquerade
  }}
  chain node-port-here {{ meta priority set meta l4proto . th dport map @node-port-local goto dispatch; }}
  chain mark-for-masquerade {{ meta mark set meta mark or {mark}; goto dispatch; }}
  chain masquerade-marked {{
    meta mark and {mark} != 0 meta mark set meta mark xor {mark} masquerade fully-random
  }}
  chain nat-postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    jump masquerade-marked
    ct status dnat {ip} saddr . {ip} daddr . meta l4proto . th dport @local-endpoint-pairs masquerade fully-random
  }}
  chain source-check {{ {ip} daddr . meta l4proto . th dport @source-ranged goto source-ranges; }}
  chain source-ranges {{
    {ranges}
    drop
  }}
  chain refuse-frontends {{
    {ip} daddr . meta l4proto . th dport @reject-frontends reject
    {ip} daddr . meta l4proto . th dport @drop-frontends drop
  }}
  chain node-port-refusal-gate {{
    {refusal_gate}
  }}
  chain refuse-node-ports {{
    meta l4proto . th dport @reject-node-ports reject
    meta l4proto . th dport @drop-node-ports drop
  }}
  chain refuse-cluster-ips {{
    {ip} daddr @cluster-ips {closed}
    {ip} daddr @service-cidrs drop
  }}
  chain guard-loopback {{
    {guard}
  }}
  chain nat-prerouting {{ type nat hook prerouting priority dstnat; policy accept; jump services; }}
  chain nat-output {{ type nat hook output priority -100; policy accept; jump services; }}
  chain dnat-done-prerouting {{
    type filter hook prerouting priority dstnat + 1; policy accept;
    ct state new ct status dnat meta priority != none jump after-dnat
  }}
  chain dnat-done-output {{
    type filter hook output priority -99; policy accept;
    ct state new ct status dnat meta priority != none jump after-dnat
  }}
  chain pre-dnat-prerouting {{
    type filter hook prerouting priority dstnat - 10; policy accept; ct state new jump source-check;
  }}
  chain pre-dnat-output {{ type filter hook output priority -110; policy accept; ct state new jump source-check; }}
  chain filter-input {{
    type filter hook input priority filter; policy accept;
    jump guard-loopback
    ct state new jump refuse-frontends
    ct state new jump node-port-refusal-gate
  }}
  chain filter-forward {{
    type filter hook forward priority filter; policy accept;
    ct state new jump refuse-frontends
    ct state new jump refuse-cluster-ips
  }}
  chain filter-output {{
    type filter hook output priority filter; policy accept;
    jump guard-loopback
    ct state new jump refuse-frontends
    ct state new jump refuse-cluster-ips
  }}
"""

REMEMBER = """
    meta priority and ffff:e000 @affinity-{timeout} update @sticky {{ meta priority and ffff:e000 . jhash {ip} saddr mod 4294967295 seed 0x5bd1e995 timeout {timeout}s : meta priority }}
"""  # noqa: E501  # one rule of nft is one line

GUARD = """
    ip daddr != 127.0.0.0/8 return
    ip saddr 127.0.0.0/8 return
    ct state established,related return
    ct status dnat return
    drop
"""


def netmask(family, length):
    bits = family.address_bytes * 8
    return format_address(((1 << length) - 1 << bits - length).to_bytes(family.address_bytes))


def text_of(facts, family, timeouts, lengths):
    """The layout in nft's language, written down by hand: what `build` must be equal to."""
    ip, loopback = WORD[family], "127.0.0.0/8" if family is IPV4 else "::1"
    match facts.detector:
        case None:
            pods = outside = ""
        case SourcePrefix(prefix):
            pods, outside = f"{ip} saddr {prefix}", f"{ip} saddr != {prefix}"
        case InputInterface(name):
            pods, outside = f'iifname "{name}"', f'iifname != "{name}"'
        case InputInterfacePrefix(name):
            pods, outside = f'iifname "{name}*"', f'iifname != "{name}*"'
    if facts.masquerade_all:
        internal = "goto mark-for-masquerade"
    elif outside:
        internal = f"{outside} goto mark-for-masquerade\n goto dispatch"
    else:
        internal = "goto dispatch"
    answers = facts.loopback_node_ports and family is IPV4
    if facts.node_port_addresses is None:
        but = "" if answers else f"{ip} daddr != {loopback}"
        gate, refusal_gate = f"fib daddr type local {but} goto node-ports", f"{but} jump refuse-node-ports"
    else:
        matches = [f"{ip} daddr @node-port-addresses", *([f"{ip} daddr {loopback}"] if answers else [])]
        gate = "\n".join(f"{match} goto node-ports" for match in matches)
        refusal_gate = "\n".join(f"{match} jump refuse-node-ports" for match in matches)
    addresses = ", ".join(map(format_address, sorted(facts.node_port_addresses or ())))
    values = {
        "ip": ip,
        "address": "ipv4_addr" if family is IPV4 else "ipv6_addr",
        "addresses": f"elements = {{ {addresses} }};" if addresses else "",
        "cidrs": f"elements = {{ {', '.join(map(str, facts.service_cidrs))} }};" if facts.service_cidrs else "",
        "mark": hex(facts.mark),
        "internal": internal,
        "gate": gate,
        "refusal_gate": refusal_gate,
        "external_pods": f"{pods} goto external-all" if pods else "",
        "node_port_pods": f"{pods} goto node-port-all" if pods else "",
        "closed": "reject" if facts.reject_closed_ports else "return",
        "guard": GUARD if answers else "",
        "remember": "".join(REMEMBER.format(timeout=timeout, ip=ip) for timeout in timeouts),
        "ranges": "".join(
            f"{ip} daddr . meta l4proto . th dport . {ip} saddr"
            f"{'' if length == family.address_bytes * 8 else f' and {netmask(family, length)}'}"
            f" @source-ranges-{length} return\n"
            for length in sorted(lengths, reverse=True)
        ),
    }
    more = [f"set affinity-{timeout} {{ typeof meta priority; }}" for timeout in timeouts]
    key = f"{values['address']} . inet_proto . inet_service . {values['address']}"
    more += [f"set source-ranges-{length} {{ type {key}; }}" for length in lengths]
    picks = ", ".join(f"0:{count:x} : goto pick-{count}" for count in COMMON_COUNTS)
    return "\n".join(
        [
            f'table {ip} sluice {{ comment "sluice layout=1"',
            SETS.format(**values),
            *more,
            *(PICK.format(n=count, ip=ip) for count in COMMON_COUNTS),
            CHAINS.format(**values),
            "}",
            f"add element {ip} sluice pick {{ {picks} }}",
        ]
    )


# --- facts -----------------------------------------------------------------------------------------------------

DETECTORS = {
    IPV4: [
        None,
        *(SourcePrefix(parse_prefix(each)) for each in ("10.244.0.0/16", "10.128.0.0/9", "10.1.2.3/32", "0.0.0.0/0")),
        InputInterface("cni0"),
        InputInterface("fifteen-letters"),
        InputInterfacePrefix("veth"),
    ],
    IPV6: [
        None,
        *(SourcePrefix(parse_prefix(each)) for each in ("fd00:244::/32", "fd00:244::/57", "fd00::1/128", "::/0")),
        InputInterface("cni0"),
        InputInterfacePrefix("veth"),
    ],
}
ADDRESSES = {
    IPV4: [None, frozenset(), frozenset(map(parse_address, ("192.0.2.1", "192.0.2.2")))],
    IPV6: [None, frozenset(), frozenset(map(parse_address, ("2001:db8::1", "2001:db8::2")))],
}
CIDRS = {
    IPV4: [(), (parse_prefix("10.96.0.0/12"),), (parse_prefix("10.0.1.0/24"), parse_prefix("10.0.2.0/24"))],
    IPV6: [(), (parse_prefix("fd00:10:96::/112"),), (parse_prefix("fd00::/108"), parse_prefix("ff00::/8"))],
}


def every_facts(family):
    """Every combination of facts; marks and networks take turns."""
    loopback = (False, True) if family is IPV4 else (False,)
    combinations = itertools.product(DETECTORS[family], (False, True), ADDRESSES[family], loopback, (True, False))
    for number, (detector, everything, addresses, answers, reject) in enumerate(combinations):
        yield NodeFacts(
            mark=1 << number % 32,
            masquerade_all=everything,
            detector=detector,
            node_port_addresses=addresses,
            loopback_node_ports=answers,
            reject_closed_ports=reject,
            service_cidrs=CIDRS[family][number % 3],
        )


STEP = {IPV4: 17, IPV6: 11}


def some_facts(family):
    """Combinations in which every value of every fact occurs."""
    chosen = [facts for number, facts in enumerate(every_facts(family)) if number % STEP[family] == 0]
    for field in NodeFacts.__struct_fields__:
        if field != "mark":
            assert {getattr(each, field) for each in chosen} == {getattr(each, field) for each in every_facts(family)}
    return chosen


LENGTHS = {IPV4: (32, 24, 9, 0), IPV6: (128, 64, 57, 0)}
TIMEOUTS = (600, 10800)


def layout_of(facts, family, **use):
    return build(facts, family, **{"timeouts": TIMEOUTS, "lengths": LENGTHS[family], **use})


def elements_of(facts, family):
    """The messages for the elements that facts have."""
    addresses = map(Element, sorted(facts.node_port_addresses or ()))
    return [
        *add_elements(family, TABLE, names.SERVICE_CIDRS, prefix_elements(facts.service_cidrs)),
        *add_elements(family, TABLE, names.NODE_PORT_ADDRESSES, addresses),
    ]


def create(namespace, facts, family, **use):
    namespace.socket.commit([*messages_to_create(layout_of(facts, family, **use)), *elements_of(facts, family)])


def read(namespace, family):
    static = read_static(namespace.socket, family)
    assert static is not None
    return static._replace(picks=tuple(sorted(static.picks)))


def adopt(namespace, family):
    return facts_of(
        read(namespace, family),
        read_elements(namespace.socket, family, names.SERVICE_CIDRS),
        read_elements(namespace.socket, family, names.NODE_PORT_ADDRESSES),
    )


def listed_elements(namespace, family):
    return {name: sorted(read_elements(namespace.socket, family, name)) for name in read(namespace, family).sets}


# --- what the kernel holds ---------------------------------------------------------------------------------------


@FAMILIES
def test_it_is_what_nft_compiles_from_text(namespace, family):
    ours, theirs = namespace(), namespace()
    for facts in some_facts(family):
        ours.socket.commit([*messages_to_recreate(layout_of(facts, family)), *elements_of(facts, family)])
        theirs.nft(f"table {WORD[family]} sluice; delete table {WORD[family]} sluice\n")
        theirs.nft(text_of(facts, family, TIMEOUTS, LENGTHS[family]))
        mine, compiled = read(ours, family), read(theirs, family)
        assert mine.sets == compiled.sets
        assert mine.chains == compiled.chains
        assert mine == compiled
        assert listed_elements(ours, family) == listed_elements(theirs, family)


@FAMILIES
def test_the_kernel_tells_what_it_was_told(namespace, family):
    there = namespace()
    create(there, NodeFacts(), family, counts=[100, 8191])
    wanted = state_of(layout_of(NodeFacts(), family, counts=[100, 8191]))
    assert read(there, family) == wanted._replace(picks=tuple(sorted(wanted.picks)))


SOME = {
    IPV4: {
        names.CLUSTER_IP: Element(b"\x0a\x60\0\1\6\0\0\0\0\x50\0\0", b"\3\x20\0\0", "default/web:http"),
        names.EXTERNAL_IPS: Element(b"\xc0\0\2\x0a\6\0\0\0\0\x50\0\0"),
        names.NODE_PORT: Element(b"\6\0\0\0\x75\x80\0\0", b"\3\x20\1\0", "default/web"),
        names.ENDPOINTS_UDP: Element(b"\0\x20\0\0\2\0\0\0", b"\x0a\xf4\1\x0b\x1f\x90\0\0"),
        names.MEMBERS: Element(b"\0\x20\0\0\2\0\0\0", b"\5\x20\0\0"),
        names.SLOTS: Element(b"\5\x20\0\0", b"\x0a\xf4\1\x0b\x1f\x90\0\0"),
        names.affinity(600): Element(b"\0\x20\0\0"),
        names.source_ranges(24): Element(b"\xc0\0\2\x0a\6\0\0\0\0\x50\0\0\xc0\xa8\1\0"),
    },
    IPV6: {
        names.CLUSTER_IP: Element(parse_address("fd00::1") + b"\6\0\0\0\0\x50\0\0", b"\3\x20\0\0", "default/web:http"),
        names.EXTERNAL_IPS: Element(parse_address("2001:db8::a") + b"\6\0\0\0\0\x50\0\0"),
        names.NODE_PORT: Element(b"\6\0\0\0\x75\x80\0\0", b"\3\x20\1\0", "default/web"),
        names.ENDPOINTS_UDP: Element(b"\0\x20\0\0\2\0\0\0", parse_address("fd00:244::b") + b"\x1f\x90\0\0"),
        names.MEMBERS: Element(b"\0\x20\0\0\2\0\0\0", b"\5\x20\0\0"),
        names.SLOTS: Element(b"\5\x20\0\0", parse_address("fd00:244::b") + b"\x1f\x90\0\0"),
        names.affinity(600): Element(b"\0\x20\0\0"),
        names.source_ranges(64): Element(
            parse_address("2001:db8::a") + b"\6\0\0\0\0\x50\0\0" + parse_address("fd00:50::")
        ),
    },
}
PRINTED = {
    IPV4: [
        '10.96.0.1 . tcp . 80 comment "default/web:http" : 0:2003',
        "{ 192.0.2.10 . tcp . 80 }",
        'tcp . 30080 comment "default/web" : 1:2003',
        "0:2000 . 2 : 10.244.1.11 . 8080",
        "0:2000 . 2 : 0:2005",
        "0:2005 : 10.244.1.11 . 8080",
        "{ 0:2000 }",
        "192.0.2.10 . tcp . 80 . 192.168.1.0",
    ],
    IPV6: [
        'fd00::1 . tcp . 80 comment "default/web:http" : 0:2003',
        "{ 2001:db8::a . tcp . 80 }",
        'tcp . 30080 comment "default/web" : 1:2003',
        "0:2000 . 2 : fd00:244::b . 8080",
        "0:2000 . 2 : 0:2005",
        "0:2005 : fd00:244::b . 8080",
        "{ 0:2000 }",
        "2001:db8::a . tcp . 80 . fd00:50::",
    ],
}
LONG = "n" * 63 + "/" + "s" * 63 + ":" + "p" * 63


@FAMILIES
def test_nft_prints_it_and_loads_the_print_again(namespace, family):
    ours, reloaded = namespace(), namespace()
    for facts in some_facts(family):
        ours.socket.commit(
            [
                *messages_to_recreate(layout_of(facts, family)),
                *elements_of(facts, family),
                *(
                    message
                    for name, element in SOME[family].items()
                    for message in add_elements(family, TABLE, name, [element])
                ),
            ]
        )
        printed = ours.listing()
        words = " ".join(printed.split())
        assert [each for each in PRINTED[family] if each not in words] == []
        reloaded.nft(f"flush ruleset\n{printed}")
        assert read(reloaded, family) == read(ours, family)
        assert listed_elements(reloaded, family) == listed_elements(ours, family)
        assert reloaded.listing() == printed
        # Over itself: rules are added once more, as nft does with any listing, and sets stay.
        reloaded.nft(printed)
        assert listed_elements(reloaded, family) == listed_elements(ours, family)


def test_nft_prints_and_loads_a_comment_of_which_it_knows_only_a_part(namespace):
    there = namespace()
    create(there, NodeFacts(), IPV4)
    element = SOME[IPV4][names.CLUSTER_IP]._replace(comment=LONG)
    there.socket.commit(add_elements(IPV4, TABLE, names.CLUSTER_IP, [element]))
    assert read_elements(there.socket, IPV4, names.CLUSTER_IP) == [element]
    there.nft(f"flush ruleset\n{there.listing()}")
    assert read_elements(there.socket, IPV4, names.CLUSTER_IP) == [element._replace(comment=LONG[:127])]


# --- from the kernel back to facts -------------------------------------------------------------------------------


@FAMILIES
def test_facts_come_back_and_a_second_replacement_is_empty(namespace, family):
    there = namespace()
    create(there, NodeFacts(), family)
    for facts in some_facts(family):
        layout = layout_of(facts, family)
        replacement = messages_to_replace(read(there, family), layout)
        assert not replacement.recreated
        emptied = [
            message
            for name in (names.SERVICE_CIDRS, names.NODE_PORT_ADDRESSES)
            for message in _emptied(there, family, name)
        ]
        there.socket.commit([*replacement.messages, *emptied, *elements_of(facts, family)])
        found = adopt(there, family)
        assert (found.facts, found.damage) == (facts, frozenset())
        assert (found.timeouts, found.lengths) == (set(TIMEOUTS), set(LENGTHS[family]))
        assert messages_to_replace(read(there, family), layout) == ([], False)


def _emptied(there, family, name):
    return [flush_elements(family, TABLE, name)] if read_elements(there.socket, family, name) else []


def test_other_timeouts_lengths_and_counts_come_and_go_in_place(namespace):
    there = namespace()
    create(there, NodeFacts(), IPV4)
    there.socket.commit(add_elements(IPV4, TABLE, names.CLUSTER_IP, [SOME[IPV4][names.CLUSTER_IP]]))
    for use in (
        {"timeouts": {5}, "lengths": {8}, "counts": {70}},
        {"timeouts": set(), "lengths": set(), "counts": {70, 80}},
        {"timeouts": {5, 6}, "lengths": {8, 9}, "counts": set()},
    ):
        layout = layout_of(NodeFacts(), IPV4, **use)
        there.socket.commit(messages_to_replace(read(there, IPV4), layout).messages)
        found = adopt(there, IPV4)
        assert found.damage == frozenset()
        assert (found.timeouts, found.lengths) == (use["timeouts"], use["lengths"])
        assert found.counts == use["counts"] | set(COMMON_COUNTS)
    assert read_elements(there.socket, IPV4, names.CLUSTER_IP) == [SOME[IPV4][names.CLUSTER_IP]]


EDITS = {
    "a rule more": ("add rule ip sluice services accept", {"rule 5 of chain services should not be there"}),
    "a counter in front": (
        "insert rule ip sluice filter-input counter",
        {"rule 1 of chain filter-input should not be there"},
    ),
    "an empty chain": (
        "flush chain ip sluice dispatch",
        {"chain dispatch lacks its rule 1"},
    ),
    "a chain more": ("add chain ip sluice mine; add rule ip sluice mine drop", {"chain mine should not be there"}),
    "a hook more": (
        "add chain ip sluice mine { type filter hook input priority 0; policy drop; }",
        {"chain mine should not be there"},
    ),
    "a jump to a chain more": (
        "add chain ip sluice mine; insert rule ip sluice filter-input jump mine",
        {"chain mine should not be there", "rule 1 of chain filter-input should not be there"},
    ),
    "a set more": (
        "add set ip sluice mine { type ipv4_addr; }; add rule ip sluice source-check ip saddr @mine drop",
        {"set mine should not be there", "rule 2 of chain source-check should not be there"},
    ),
    "an unnamed set": (
        "add rule ip sluice source-check ip saddr { 192.0.2.1, 192.0.2.2 } drop",
        {"rule 2 of chain source-check should not be there"},
    ),
    "another policy": (
        "add chain ip sluice filter-forward { policy drop; }",
        {"chain filter-forward has another policy than it should"},
    ),
    "a pick gone": ("delete element ip sluice pick { 0:3 }", {"map pick has nothing for 3"}),
    "a pick astray": (
        "delete element ip sluice pick { 0:3 }; add element ip sluice pick { 0:3 : goto pick-4 }",
        {"map pick leads 3 elsewhere than it should"},
    ),
    "a pick too many": (
        "add element ip sluice pick { 0:fff : goto pick-4 }",
        {"map pick should have nothing for 4095"},
    ),
    "asleep": ("add table ip sluice { flags dormant; }", {"the table is switched off (dormant)"}),
    "a chain gone": (
        "flush chain ip sluice filter-output; delete chain ip sluice filter-output",
        {"chain filter-output is missing"},
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_what_another_hand_changes_is_damage_and_is_repaired_without_touching_elements(namespace, edit):
    there = namespace()
    facts = next(every_facts(IPV4))
    create(there, facts, IPV4)
    there.socket.commit(add_elements(IPV4, TABLE, names.CLUSTER_IP, [SOME[IPV4][names.CLUSTER_IP]]))
    command, damage = EDITS[edit]
    there.nft(command)
    found = adopt(there, IPV4)
    assert (found.facts, found.damage) == (facts, damage)
    replacement = messages_to_replace(read(there, IPV4), layout_of(facts, IPV4))
    assert not replacement.recreated
    there.socket.commit(replacement.messages)
    assert adopt(there, IPV4).damage == frozenset()
    assert messages_to_replace(read(there, IPV4), layout_of(facts, IPV4)) == ([], False)
    assert read_elements(there.socket, IPV4, names.CLUSTER_IP) == [SOME[IPV4][names.CLUSTER_IP]]


def test_every_single_rule_that_vanishes_is_damage(namespace):
    there = namespace()
    facts = next(facts for facts in every_facts(IPV4) if facts.detector and facts.loopback_node_ports)
    layout = layout_of(facts, IPV4)
    create(there, facts, IPV4)
    seen = {decode_rule(payload)[1].chain for payload in there.socket.dump(list_rules(IPV4, TABLE))}
    for chain in sorted(name for name in seen if not name.startswith("pick-") or name == "pick-64"):
        for place in range(len(read(there, IPV4).chains[chain].rules)):
            listed = [decode_rule(payload)[1] for payload in there.socket.dump(list_rules(IPV4, TABLE))]
            handle = [each.handle for each in listed if each.chain == chain][place]
            there.socket.commit([delete_rule(IPV4, TABLE, chain, handle)])
            assert any(f"chain {chain}" in sentence for sentence in adopt(there, IPV4).damage), (chain, place)
            there.socket.commit(messages_to_replace(read(there, IPV4), layout).messages)
    assert adopt(there, IPV4).damage == frozenset()


def test_two_rules_that_change_places_are_damage(namespace):
    there = namespace()
    create(there, NodeFacts(), IPV4)
    listed = [decode_rule(payload)[1] for payload in there.socket.dump(list_rules(IPV4, TABLE))]
    first = next(each.handle for each in listed if each.chain == "refuse-cluster-ips")
    there.nft(
        f"delete rule ip sluice refuse-cluster-ips handle {first}\n"
        "add rule ip sluice refuse-cluster-ips ip daddr @cluster-ips reject\n"
    )
    assert adopt(there, IPV4).damage == {
        "the rules of chain refuse-cluster-ips are in another order than they should be"
    }


def test_tables_of_others_are_neither_read_nor_touched(namespace):
    there = namespace()
    there.nft("table ip other { chain services { accept; }; set cluster-ips { type ipv4_addr; }; }")
    before = there.listing()
    create(there, NodeFacts(), IPV4)
    assert adopt(there, IPV4).damage == frozenset()
    there.socket.commit(messages_to_delete(IPV4))
    assert there.listing() == before
    assert read_static(there.socket, IPV4) is None


# --- transactions --------------------------------------------------------------------------------------------------


def test_nothing_of_a_refused_transaction_is_applied_and_every_error_is_traced(namespace):
    there = namespace()
    create(there, NodeFacts(), IPV4)
    good, bad = SOME[IPV4][names.CLUSTER_IP], SOME[IPV4][names.NODE_PORT]
    there.socket.commit(add_elements(IPV4, TABLE, names.NODE_PORT, [bad]))
    other = [bad._replace(key=b"\6\0\0\0\0\7\0\0"), bad._replace(data=b"\4\x20\1\0")]
    batch = [
        *add_elements(IPV4, TABLE, names.CLUSTER_IP, [good]),
        *add_elements(IPV4, TABLE, names.NODE_PORT, other),
        *delete_elements(IPV4, TABLE, names.SLOTS, [b"\5\x20\0\0"]),
    ]
    with pytest.raises(TransactionError) as raised:
        there.socket.commit(batch)
    assert [(error.message, error.errno) for error in raised.value.errors] == [(1, errno.EEXIST), (2, errno.ENOENT)]
    keys = [key_at(batch[error.message], error.offset) for error in raised.value.errors]
    assert keys == [bad.key, b"\5\x20\0\0"]
    assert read_elements(there.socket, IPV4, names.CLUSTER_IP) == []
    assert read_elements(there.socket, IPV4, names.NODE_PORT) == [bad]


def test_a_transaction_that_rests_on_an_old_generation_is_refused(namespace):
    there = namespace()
    create(there, NodeFacts(), IPV4)
    generation = there.socket.generation()
    sent = add_elements(IPV4, TABLE, names.NODE_PORT, [SOME[IPV4][names.NODE_PORT]])
    there.nft("add table ip stranger")
    with pytest.raises(StaleGenerationError):
        there.socket.commit(sent, generation)
    assert read_elements(there.socket, IPV4, names.NODE_PORT) == []
    there.socket.commit(sent, there.socket.generation())
    assert read_elements(there.socket, IPV4, names.NODE_PORT) == [SOME[IPV4][names.NODE_PORT]]


def test_one_transaction_takes_more_elements_than_the_kernels_usual_limits(namespace):
    there = namespace()
    create(there, NodeFacts(), IPV4)
    # More than 65,535 elements, and some MB: far above the default send buffer.
    elements = [Element(number.to_bytes(8), number.to_bytes(8), f"a/b:{number}") for number in range(70_000)]
    there.socket.commit(add_elements(IPV4, TABLE, names.ENDPOINTS_TCP, elements))
    assert sorted(read_elements(there.socket, IPV4, names.ENDPOINTS_TCP)) == elements
    there.socket.commit(delete_elements(IPV4, TABLE, names.ENDPOINTS_TCP, (each.key for each in elements)))
    assert read_elements(there.socket, IPV4, names.ENDPOINTS_TCP) == []


def test_more_errors_than_a_small_buffer_holds_are_all_told(namespace):
    there = namespace()
    create(there, NodeFacts(), IPV4)
    batch = [
        message for number in range(3000) for message in delete_elements(IPV4, TABLE, names.SLOTS, [number.to_bytes(4)])
    ]
    with pytest.raises(TransactionError) as raised:
        there.socket.commit(batch)
    assert [error.message for error in raised.value.errors] == list(range(3000))


def test_a_set_that_is_not_there_is_an_error_that_says_so(namespace):
    there = namespace()
    assert read_static(there.socket, IPV4) is None
    with pytest.raises(NetlinkError) as raised:
        read_elements(there.socket, IPV4, names.SLOTS)
    assert raised.value.errno == errno.ENOENT


def test_what_was_asked_from_another_namespace_is_not_seen(namespace):
    one, other = namespace(), namespace()
    create(one, NodeFacts(), IPV4)
    assert read_static(other.socket, IPV4) is None
    assert adopt(one, IPV4).facts == NodeFacts()
