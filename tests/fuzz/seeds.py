"""Inputs for a fuzzer to begin with: real ones, as far as there are recordings."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import msgspec

from proxy.bundle import reading as bundle_reading
from proxy.explain.surroundings import Surroundings
from proxy.report import SourceReport, Status
from proxy.sources.yaml_json import to_json
from proxy.userspace import control
from rules.dataplane import Capabilities
from rules.forwarding import Backend, Family, Frontend, Kind, NodeFacts, Protocol, Route
from rules.iptables.text import Saved
from rules.ipvs import chains
from rules.netlink.attributes import DONE, attribute, message, messages, nested, text
from rules.netlink.conntrack import Flow
from rules.nftables.layout import TABLE
from rules.nftables.messages import Element, add_elements
from tests.fuzz.peers import SEPARATOR, archive_of
from tests.fuzz.seeds_of_rules import batched, ipvs, ipvs_whole, lines_of, nft, nft_json, saved

_TESTS = Path(__file__).resolve().parents[1]
_DATA = _TESTS / "data"
_RECORDINGS = tuple(each for each in sorted(_DATA.glob("kube-proxy-*")) if each.is_dir())
_LARGEST = 1 << 16


def seeds(name: str) -> list[bytes]:
    """The first inputs of a target."""
    return _OF[name]() if name in _OF else []


def _from_api_server() -> list[bytes]:
    found = json.loads((_DATA / "api-server-v1.36.json").read_text())
    return [each.encode() for each in _texts(found) if each.lstrip().startswith("{")][:50]


def _texts(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [json.dumps(value), *(text for each in value.values() for text in _texts(each))]
    if isinstance(value, list):
        return [text for each in value for text in _texts(each)]
    return []


def _contents(paths: Iterable[Path]) -> list[bytes]:
    return [each.read_bytes() for each in sorted(paths) if each.is_file() and each.stat().st_size < _LARGEST]


def _recorded(name: str) -> Callable[[], list[bytes]]:
    """Conversations with a kernel (`tests.fuzz.record`)."""

    def read() -> list[bytes]:
        return [bytes.fromhex(line) for line in (_RECORDED / f"{name}.txt").read_text().split()]

    return read


_RECORDED = Path(__file__).with_name("recorded")


def _of_legacy() -> list[bytes]:
    return _recorded("legacy")()


def _ipvs_conversation() -> list[bytes]:
    """As of a kernel with IPVS, which the one that was recorded has not."""
    said = [line.split() for line in (_DATA / "ipvs" / "linux-6.1.txt").read_text().splitlines() if line[:1] != "#"]
    payloads = {kind: [bytes.fromhex(data) for name, data in said if name == kind] for kind, _ in said}
    number = message(16, 0, b"\1\2\0\0" + attribute(1, (36).to_bytes(2, sys.byteorder)))
    done = message(DONE, 0, bytes(4))

    def told(kind: str) -> bytes:
        return b"".join(message(36, 2, each) for each in payloads.get(kind, ()))

    info = message(36, 0, bytes(12))
    both = told("server") + done + (told("real") + done) * 3
    return [number + info + both + both + told("timeouts"), number + info + told("server") + done + told("real") + done]


def _device_conversation() -> list[bytes]:
    """As of a kernel with such a device."""
    link = message(16, 0, struct.pack("=BxHiII", 0, 0, 7, 1, 0) + nested(18, text(1, "dummy")))
    done = message(DONE, 0, bytes(4))

    def address(af: int, value: bytes) -> bytes:
        return message(20, 2, struct.pack("=BBBBi", af, 32, 0, 0, 7) + attribute(2, value))

    four, six = address(2, b"\x0a\x60\0\1") + done, address(10, b"\xfd" + bytes(15)) + done
    return [link + four + link + four + link + six + link + six]


def _matches() -> list[bytes]:
    """Of legacy tables, what stands behind the name of each match."""
    found = [b"\0" + bytes(16)]
    for table in _of_legacy():
        for name in (b"conntrack", b"state", b"tcp", b"udp", b"multiport"):
            at = table.find(name + b"\0")
            while at >= 0:
                size = int.from_bytes(table[at - 2 : at], sys.byteorder)
                found.append(table[at + 29 : at - 2 + size])
                at = table.find(name + b"\0", at + 1)
    return list(dict.fromkeys(found))


def _told() -> list[bytes]:
    """Each thing that a kernel told, by itself too."""
    whole = _recorded("told")()
    return [*whole, *(each.payload for data in whole for each in messages(data))]


def _entries() -> list[bytes]:
    """Entries of connection tracking."""
    whole = [*_recorded("flows")(), *_recorded("told")()]
    return [each.payload for data in whole for each in messages(data) if each.kind >> 8 == 1]


def _objects() -> list[bytes]:
    """A Service and its slices, on a node; as JSON."""
    found = []
    paths = [_DATA / "explain" / "cluster.yaml", _RECORDINGS[-1] / "objects.yaml"]
    for path in paths:
        every = json.loads(to_json(path.read_text()))
        listed = [item for each in every for item in (each.get("items") or [each] if each else ())]
        nodes = [each for each in listed if each["kind"] == "Node"][:1]
        for service in (each for each in listed if each["kind"] == "Service"):
            name = service["metadata"]["name"]
            of_it = [each for each in listed if name in json.dumps(each["metadata"]) and each["kind"] != "Service"]
            items = [*nodes, service, *of_it[:2]]
            found.append(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}).encode())
    return found


def _manifests() -> list[bytes]:
    """The YAML that ships, by its documents."""
    texts = _contents((_TESTS.parent / "examples").rglob("*.yaml"))
    texts += [(_DATA / "explain" / "cluster.yaml").read_bytes()]
    return [b"---\n".join(each) for whole in texts for each in batched(whole.split(b"---\n"), 3)]


def _questions() -> list[bytes]:
    asked = ("10.96.0.10:80/TCP", "[fd00:96::10]:53/UDP", "shop/web", "shop/web:http", "192.0.2.1:30080", "1.2.3.4:5")
    who = ("", "10.244.1.9", "pod", "node", "outside\neth0", "[fd00::1]")
    return [f"{one}\n{other}".encode() for one in asked for other in who]


def _requests() -> list[bytes]:
    paths = ("/healthz", "/livez", "/metrics", "/configz", "/statusz", "/flagz", "/proxyMode", "/debug/services/data")
    more = b"Host: [::1]:10249\r\nAccept: application/json;g=config.k8s.io;v=v1beta1;as=Statusz\r\n"
    asked = [b"GET %b HTTP/1.1\r\n%bAccept-Encoding: gzip\r\n\r\n" % (each.encode(), more) for each in paths]
    return [
        *asked,
        b"GET /healthz HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc",
        b"HEAD / HTTP/1.0\r\n\r\n",
        b"PUT /debug/flags/v HTTP/1.1\nContent-Length: 1\n\n4",
        b"GET http://a/metrics?x=%ff HTTP/1.1\r\nAccept: application/vnd.google.protobuf; encoding=delimited\r\n\r\n",
    ]


def _page_questions() -> list[bytes]:
    asked = ("service=shop/web", "target=shop/web&from=pod&interface=eth0", "since=ab.3", "target=10.96.0.10:80/TCP")
    return [f"/data\n{each}".encode() for each in asked] + [b"/static/services.js\n", b"\n--v=3\n--config=x"]


def _arguments() -> list[bytes]:
    return [
        b"--proxy-mode=nftables\n--v=4\n--cluster-cidr=10.244.0.0/16,fd00::/48\n--sync-period\n30s",
        b"-v2\n--nodeport-addresses=primary\n--feature-gates=A=true,AllAlpha=false\n--healthz-bind-address=[::1]:1",
        b"--conntrack-max-per-core=0\n--kube_api_qps=1e3\n--vmodule=a=1\n--bind-address=::\n--masquerade-all",
    ]


def _credentials() -> list[bytes]:
    return [
        b'{"server": "https://10.0.0.1:6443", "authorization": "Bearer a", "expires": 1.5, "ca": "", "files": ["f"]}',
        b'{"server": "http://[fd00::1]:80", "proxy_url": "http://a:b@c:1", "insecure": true, "key": "k"}',
        b'{"error": "no"}',
        b"https://[fd00::1]:6443/path",
    ]


def _logs() -> list[bytes]:
    return [
        b'{"token": "abc", "Authorization": "Bearer eyJhbGciOi.eyJzdWIi.sig"} --token-file /x k: LS0tLS1CRUdJTi',
        b"-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----\nhttps://user:pass@host/ api_key='x y'",
    ]


def _pieces() -> list[bytes]:
    listed = b"apiVersion: v1\nitems:\n" + b"- kind: 'a'\n  b: |\n    c\n" * 4 + b"kind: List\n"
    return [b"\0" + each for each in (listed, listed.replace(b"\n", b"\n  "), b"---\na: &b 1\nc: *b\n" * 4)]


def _elements() -> list[bytes]:
    element = Element(b"\x0a\x60\0\1\x06\0\0\0\0\x50\0\0", b"\0\1\0\0", "ns/web:http")
    return [message[16:] for message in add_elements(Family.IPV4, TABLE, "frontends", [element])]


def _said_by_ipvs() -> list[bytes]:
    said = (_DATA / "ipvs" / "linux-6.1.txt").read_text().splitlines()
    return [bytes.fromhex(line.split()[1]) for line in said if not line.startswith("#")]


def _answers() -> list[bytes]:
    answer = b'{"part": {"routes": []}}\n{"result": {}}'
    return [answer, b'{"error": "no"}', b'{"hairpins": [["CmAAAQ==", 6, 1]]}']


def _frames() -> list[bytes]:
    said = (control.Hello(), control.Drain(seconds=1), control.Stop(), control.Done(), control.Failed("no"))
    return [control.frame(each)[control.HEAD_BYTES :] for each in said]


def _applied() -> list[bytes]:
    frontend, backend = Frontend(bytes([10, 96, 0, 1]), Protocol.TCP, 80), Backend(bytes([10, 244, 1, 1]), 8080)
    route = Route(kind=Kind.LOAD_BALANCER, backends=frozenset([backend]), affinity=9, label="ns/web:http")
    node_port = Route(kind=Kind.NODE_PORT, backends=frozenset([backend]), local_backends=frozenset([backend]))
    said = control.Apply(
        family=Family.IPV4,
        node=control.WireNode(node_port_addresses=frozenset([bytes(4)])),
        reset=True,
        put=[(frontend, route), (frontend._replace(address=b"", port=30080), node_port)],
        removed=[frontend],
    )
    return [control.frame(said)[control.HEAD_BYTES :]]


def _bundles() -> list[bytes]:
    manifest = bundle_reading.Manifest(format=bundle_reading.FORMAT, version="1", taken="now", node="n")
    files = [msgspec.json.encode(manifest), b"null", b'{"items": []}', b"[]", b"null", b'{"judge": "it"}']
    return [archive_of(files), SEPARATOR.join(files)]


def _bundles_of_verbs() -> list[bytes]:
    """The files of a bundle with a table, a status and what was around."""
    manifest = bundle_reading.Manifest(
        format=bundle_reading.FORMAT, version="1", taken="now", node="n", addresses=(bytes([192, 0, 2, 1]),)
    )
    frontend, backend = Frontend(bytes([10, 96, 0, 1]), Protocol.TCP, 80), Backend(bytes([10, 244, 1, 1]), 8080)
    routes = ((frontend, Route(kind=Kind.CLUSTER_IP, backends=frozenset([backend]), label="default/web:http")),)
    saved = [
        bundle_reading.SavedTable(
            whose=whose,
            dataplane="nftables",
            family=Family.IPV4,
            node=NodeFacts(),
            capabilities=Capabilities(),
            routes=routes,
        )
        for whose in ("wanted", "held")
    ]
    said = Status(
        version="1",
        pid=1,
        uptime=1.0,
        network_namespace=1,
        node="n",
        mode="nftables",
        behaviour="nftables",
        drift_policy="repair",
        synced=True,
        source=SourceReport(description="files"),
        families=(),
        services=1,
        slices=1,
        pending_changes=0,
    )
    flow = Flow(frontend.address, frontend.address, 6, 1, 80, backend.address, frontend.address, 8080, 1, 8, b"")
    flows = bundle_reading.SavedFlows(
        judge="it", flows=(bundle_reading.SavedFlow(family=Family.IPV4, service="default/web", flow=flow, stale=True),)
    )
    objects = json.loads(_objects()[0])
    files = [manifest, said, objects, saved, Surroundings(addresses=frozenset([frontend.address])), flows]
    # Without the agent's word and without what was around, the verbs go another way.
    less = [manifest, None, objects, saved, None, flows]
    return [
        SEPARATOR.join(b"" if each is None else msgspec.json.encode(each) for each in every) for every in (files, less)
    ]


def _ours_of_ipvs() -> list[bytes]:
    """Our own chains of mode ipvs, as iptables-save prints them."""
    found = []
    for family in Family:
        lines = chains.difference(
            Saved({table: {} for table in chains.TABLES}, ()), chains.build(chains.Wanted(NodeFacts(), False), family)
        )
        found.append("\n".join(lines).encode())
    return found


_OF: Mapping[str, Callable[[], list[bytes]]] = {
    **dict.fromkeys(("api_objects", "api_stream", "manifest_json"), _from_api_server),
    "objects_to_tables": _objects,
    "manifest_yaml": _manifests,
    "manifest_pieces": _pieces,
    "configuration": lambda: _contents([*(_DATA / "configmaps").glob("*.yaml"), _RECORDINGS[-1] / "config.yaml"]),
    "arguments": _arguments,
    "credentials": _credentials,
    "secrets": _logs,
    "events": lambda: [b"ns/name", b"node1"],
    **dict.fromkeys(("iptables_save", "foreign_saved", "foreign_removal"), saved),
    "foreign_rules": lambda: [*saved()[:8], *nft()[1:4], *nft_json()[:4]],
    "foreign_rule_lines": lambda: lines_of(saved()),
    "foreign_nft": nft,
    "foreign_nft_json": nft_json,
    "ipset_saved": lambda: ipvs("ipset-save"),
    "ipvs_saved": lambda: ipvs("ipvsadm-save"),
    "addresses_listed": lambda: ipvs("kube-ipvs0.json"),
    **dict.fromkeys(("foreign_ipvs", "foreign_parts"), ipvs_whole),
    "ipvs_rules": _ours_of_ipvs,
    "kernel_routes": _recorded("routes"),
    "kernel_interfaces": lambda: [*_recorded("interfaces")(), *_recorded("local-routes")(), *_recorded("sockets")()],
    "kernel_chains": _recorded("chains"),
    "kernel_rules": lambda: [each.payload for each in messages(_recorded("chains")()[0]) if each.kind & 0xFF == 6],
    "kernel_legacy": _of_legacy,
    "xtables_matches": _matches,
    "kernel_ipsets": _recorded("ipsets"),
    "kernel_ipvs": _ipvs_conversation,
    "kernel_device": _device_conversation,
    "kernel_table": _recorded("table"),
    "kernel_flows": _recorded("flows"),
    **dict.fromkeys(("kernel_changes", "netlink_traces"), _told),
    "netlink_conntrack": _entries,
    "netlink_sockets": lambda: [*_recorded("local-routes")(), *_recorded("sockets")(), *_recorded("interfaces")()],
    "netlink_nftables": lambda: [*_elements(), *(each.payload for each in messages(_recorded("chains")()[0]))],
    "netlink_ipvs": _said_by_ipvs,
    "agent_requests": lambda: [b'{"version": 1, "verb": "table", "arguments": {"family": "IPv4"}}'],
    "agent_verbs": lambda: [
        f'{{"version": 1, "verb": "{verb}", "arguments": {{"family": "IPv4", "service": "shop/web"}}}}'.encode()
        for verb in ("status", "table", "serving", "decisions", "objects", "troubles", "counters")
    ],
    "agent_answers": _answers,
    "worker_frames": lambda: [*_frames(), *_applied()],
    "worker_tables": _applied,
    "datagrams": lambda: [bytes([1, 0, 0, 0]), bytes(16) + bytes([1, 0, 0, 0])],
    **dict.fromkeys(("http_requests", "http_answers"), _requests),
    "page_questions": _page_questions,
    "explain_questions": _questions,
    "packets": lambda: [b"\x45" + bytes(8) + b"\x06" + bytes(30), b"\x60" + bytes(5) + b"\x11" + bytes(50)],
    "bundles": _bundles,
    "bundle_answers": _bundles_of_verbs,
}
