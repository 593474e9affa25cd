"""Inputs for a fuzzer to begin with: real ones, as far as there are recordings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import msgspec

from proxy import bundle_reading
from proxy.userspace import control
from rules.forwarding import Family
from rules.nftables.layout import TABLE
from rules.nftables.messages import Element, add_elements
from tests.fuzz.peers import SEPARATOR, archive_of

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


def _rules() -> list[bytes]:
    return _contents(path for each in _RECORDINGS for path in each.rglob("*"))


def _ipvs() -> list[bytes]:
    return _contents((_TESTS / "recordings").glob("kube-proxy-v1.20.2-ipvs/[ai]*[!d]"))


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


def _bundles() -> list[bytes]:
    manifest = bundle_reading.Manifest(format=bundle_reading.FORMAT, version="1", taken="now", node="n")
    files = [msgspec.json.encode(manifest), b"null", b'{"items": []}', b"[]", b"null", b'{"judge": "it"}']
    return [archive_of(files), SEPARATOR.join(files)]


_OF: Mapping[str, Callable[[], list[bytes]]] = {
    **dict.fromkeys(("api_objects", "api_stream", "manifest_json"), _from_api_server),
    "manifest_yaml": lambda: _contents((_TESTS.parent / "examples").rglob("*.yaml")),
    "manifest_pieces": _pieces,
    "configuration": lambda: _contents([*(_DATA / "configmaps").glob("*.yaml"), _RECORDINGS[-1] / "config.yaml"]),
    **dict.fromkeys(("iptables_save", "foreign_rules"), _rules),
    "foreign_ipvs": _ipvs,
    "netlink_nftables": _elements,
    "netlink_ipvs": _said_by_ipvs,
    "agent_requests": lambda: [b'{"version": 1, "verb": "table", "arguments": {"family": "IPv4"}}'],
    "agent_answers": _answers,
    "worker_frames": _frames,
    "http_requests": lambda: [
        b"GET /healthz HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc",
        b"HEAD / HTTP/1.0\r\n\r\n",
    ],
    "packets": lambda: [b"\x45" + bytes(8) + b"\x06" + bytes(30), b"\x60" + bytes(5) + b"\x11" + bytes(50)],
    "bundles": _bundles,
}
