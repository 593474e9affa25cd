"""Decoders as functions of bytes, each of which may raise nothing but its own error."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping

from proxy.objects import KINDS, ObjectError, decode_json
from proxy.sources.manifest_objects import FileError, parse
from proxy.sources.wire import Lines, WireError, decode_event, decode_page, decode_status, head
from proxy.sources.yaml_json import YamlError, to_json
from rules.foreign.detect import Gathered, of_state, readings
from rules.foreign.gathering import ForeignError
from rules.forwarding import Family
from rules.iptables import decode as iptables_decode
from rules.iptables import text as iptables_text
from rules.iptables import trace as iptables_trace
from rules.ipvs import messages as ipvs_messages
from rules.netlink import conntrack, conntrack_events, ipset_messages
from rules.netlink.attributes import DecodeError, message, messages
from rules.netlink.counters import measure
from rules.nftables import objects as nftables_objects
from rules.nftables import trace as nftables_trace
from rules.nftables.messages import decode_elements
from rules.nftables.userdata import parse_comment

# Not from the package, which would keep older ones.
from tests.fuzz.clients import TARGETS as OF_CLIENTS
from tests.fuzz.kernel import TARGETS as OF_KERNELS
from tests.fuzz.peers import TARGETS as OF_PEERS
from tests.fuzz.texts import TARGETS as OF_TEXTS


def api_objects(data: bytes) -> None:
    """An object of each kind."""
    for kind in KINDS:
        with contextlib.suppress(ObjectError):
            decode_json(kind, data)


def api_stream(data: bytes) -> None:
    """What an API server writes: a list, the lines of a watch, a refusal."""
    decode_status(data)
    head(data)
    with contextlib.suppress(WireError):
        decode_page(data)
    with contextlib.suppress(WireError):
        for line in Lines().feed(data):
            decode_event(line)


def manifest_json(data: bytes) -> None:
    """A manifest that is JSON."""
    with contextlib.suppress(FileError):
        parse("fuzz.json", data, lambda each: each)


def manifest_yaml(data: bytes) -> None:
    """A manifest that is YAML."""
    with contextlib.suppress(FileError):
        parse("fuzz.yaml", data, _yaml)


def _yaml(data: bytes) -> bytes:
    try:
        return to_json(data.decode())
    except UnicodeDecodeError as error:
        raise YamlError(str(error)) from None


def netlink_nftables(data: bytes) -> None:
    """A dump of nftables: messages, and every kind of object that they may hold."""
    decoders: tuple[Callable[[bytes], object], ...] = (
        nftables_objects.decode_table,
        nftables_objects.decode_chain,
        nftables_objects.decode_rule,
        nftables_objects.decode_set,
        lambda payload: decode_elements([payload]),
        parse_comment,
    )
    payloads = [data]
    with contextlib.suppress(DecodeError):
        payloads += [message.payload for message in messages(data)]
    for payload in payloads:
        for decode in decoders:
            with contextlib.suppress(DecodeError):
                decode(payload)


def netlink_conntrack(data: bytes) -> None:
    """An entry of connection tracking, listed or told as ended, with its counters."""
    for event in (False, True):
        with contextlib.suppress(DecodeError):
            flow = conntrack.decode(data, 0, len(data), event=event)
            if flow is not None:
                measure(flow)
                conntrack.delete_one_request(Family.IPV4 if len(flow.source) == 4 else Family.IPV6, flow)


def netlink_ipvs(data: bytes) -> None:
    """What kernels say of virtual and real servers, and of ipsets."""
    decoders: tuple[Callable[[bytes], object], ...] = (
        *(ipvs_messages.decode_server, ipvs_messages.decode_timeouts),
        *(functools.partial(ipvs_messages.decode_real, family) for family in Family),
        *(lambda payload: ipset_messages.decode_set([payload]), ipset_messages.decode_size),
        lambda payload: ipset_messages.decode_any_set([payload]),
        ipset_messages.refused_place,
    )
    for decode in decoders:
        with contextlib.suppress(DecodeError):
            decode(data)


def netlink_traces(data: bytes) -> None:
    """What kernels tell of traced packets and of new connections; a whole datagram never raises."""
    for datagram in (data, *(message(kind, 0, data) for kind in (10 << 8 | 17, 4 << 8, 1 << 8))):
        nftables_trace.decode_events(datagram)
        iptables_trace.decode_lines(datagram)
        conntrack_events.decode_passages(datagram)
    chains = iptables_trace.chains_of(data.decode(errors="replace"))
    with contextlib.suppress(DecodeError):
        if (line := iptables_trace.decode_line(data)) is not None:
            iptables_trace.end_of(line, chains)


def iptables_save(data: bytes) -> None:
    """What iptables-save prints, ours among it or not."""
    with contextlib.suppress(iptables_text.TextError):
        saved = iptables_text.parse(data.decode(errors="replace"))
        for family in Family:
            iptables_decode.decode(saved, family)


def foreign_rules(data: bytes) -> None:
    """Rules of kube-proxy in any of the forms that files have."""
    with contextlib.suppress(ForeignError):
        readings(data)


def foreign_ipvs(data: bytes) -> None:
    """What ipvsadm, ipset and ip print of kube-proxy's ipvs mode, beside its rules."""
    gathered = Gathered()
    with contextlib.suppress(ForeignError):
        gathered.add("fuzz", data)
        gathered.add("rules", _IPVS_RULES.encode())
        gathered.readings()
        again = Gathered()
        again.add("fuzz", of_state(gathered.state()))


_IPVS_RULES = """*nat
:KUBE-SERVICES - [0:0]
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODE-PORT
COMMIT
"""


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    each.__name__: each
    for each in (
        *OF_KERNELS,
        *OF_TEXTS,
        *OF_CLIENTS,
        *OF_PEERS,
        *(api_objects, api_stream, manifest_json, manifest_yaml),
        *(
            netlink_nftables,
            netlink_conntrack,
            netlink_ipvs,
            netlink_traces,
            iptables_save,
            foreign_rules,
            foreign_ipvs,
        ),
    )
}
