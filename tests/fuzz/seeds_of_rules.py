"""Rules of kube-proxy to begin with: what was recorded, cut into pieces that take a millisecond and not a hundred."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

_TESTS = Path(__file__).resolve().parents[1]
_DATA = _TESTS / "data"
_RECORDING = _DATA / "kube-proxy-v1.36.2"

T = TypeVar("T")


def batched(values: Sequence[T], size: int) -> Iterator[tuple[T, ...]]:
    """Runs of so many values, the last one perhaps shorter."""
    rest = iter(values)
    while some := tuple(islice(rest, size)):
        yield some


_SERVICES = 1
"""Of a recording, so many are left in each seed: an input is to take a millisecond and not a hundred."""


def saved() -> list[bytes]:
    """What iptables-save printed of kube-proxy, with a few Services each."""
    paths = [*_DATA.rglob("*tables-save"), *(_TESTS / "recordings").rglob("*tables-save")]
    return [piece.encode() for path in sorted(paths) for piece in _few_services(path.read_text())]


def _few_services(text: str) -> Iterator[str]:
    """A text of iptables-save, cut: what is static, and some chains of Services with what leads to them."""
    lines = [line for line in text.split("\n") if not line.startswith("#")]
    yield "\n".join(line for line in lines if not _PER_SERVICE.search(line))
    chains = sorted({line[1:].partition(" ")[0] for line in lines if line.startswith((":KUBE-SVC-", ":KUBE-EXT-"))})
    for some in batched(chains, _SERVICES):
        kept = set(some)
        for line in lines:  # what they lead to
            words = line.split()
            if line.startswith("-A ") and words[1] in kept and words[-1].startswith("KUBE-"):
                kept.add(words[-1])
        of_them = [line for line in lines if (names := set(_PER_SERVICE.findall(line))) and names <= kept]
        yield "\n".join(["*nat", ":KUBE-SERVICES - [0:0]", ":KUBE-NODEPORTS - [0:0]", *of_them, "COMMIT", ""])


_PER_SERVICE = re.compile(r"KUBE-(?:SVC|SVL|SEP|FW|EXT|XLB)-\w+")


def nft() -> list[bytes]:
    """What nft listed of kube-proxy, whole and with the rules of a few chains each."""
    text = (_RECORDING / "nftables.nft").read_text()
    head, *chains = text.partition("\n}\n")[0].split("\n\tchain ")
    pieces = batched(chains, 4)
    older = (_DATA / "kube-proxy-older" / "nftables.nft").read_bytes()
    whole = head[: head.find("\n\tset ")]
    sets = head[len(whole) :].split("\n\tset ")[1:]
    return [
        older,
        *("\n\tchain ".join([whole, *each, ""]).removesuffix("chain ").encode() + b"}\n" for each in pieces),
        *("\n\tset ".join([whole, *each]).encode() + b"\n}\n" for each in batched(sets, 3)),
    ]


def nft_json() -> list[bytes]:
    items = json.loads((_RECORDING / "nftables.nft.json").read_text())["nftables"]
    return [json.dumps({"nftables": [*items[:2], *each]}).encode() for each in batched(items[2:], 4)]


def lines_of(texts: Iterable[bytes]) -> list[bytes]:
    """Each line that is unlike those before it but for names and numbers."""
    found: dict[bytes, bytes] = {}
    for line in b"\n".join(texts).split(b"\n"):
        found.setdefault(re.sub(rb"[A-Z0-9]{16}|\d+", b"", line), line)
    return list(found.values())


_IPVS = _TESTS / "recordings" / "kube-proxy-v1.20.2-ipvs"


def ipvs(*names: str) -> list[bytes]:
    """What each program printed, a few lines each."""
    found = []
    for name in names:
        lines = (_IPVS / name).read_bytes().splitlines(keepends=True)
        found += [b"".join(each) for each in batched(lines, 12)] if name.endswith("-save") else [b"".join(lines)]
    return found


def ipvs_whole() -> list[bytes]:
    """All of a family, small enough: every set that there is, with few elements."""
    sets, servers, rules = (
        (_IPVS / name).read_text().split("\n") for name in ("ipset-save", "ipvsadm-save", "iptables-save")
    )
    few = [*(line for line in sets if line.startswith("create")), *(line for line in sets if line.startswith("add"))][
        :40
    ]
    addresses = (_IPVS / "kube-ipvs0.json").read_text().split("\n")
    return [
        "\n".join(each).encode() for each in ([*few, *servers[:8]], [*few, *servers[:8], *rules], [*few, *addresses])
    ]
