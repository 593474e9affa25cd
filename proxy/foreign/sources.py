"""Where another proxy's rules come from: the kernel of this node, by the programs that list them, or files.

Nothing is changed.  A program runs in the network namespace of the calling thread.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from proxy.addresses import lenient_address
from proxy.explain.surroundings import Surroundings
from proxy.foreign import ipvs
from rules.dataplane import DataplaneError
from rules.foreign import detect, kube_proxy_iptables, kube_proxy_ipvs, kube_proxy_nftables, nft_json, saved
from rules.foreign.gathering import ForeignError, Reading
from rules.foreign.nft_model import FAMILIES, TABLE
from rules.foreign.saved import Chains, SavedFamily
from rules.forwarding import Address, Family
from rules.iptables.programs import available
from rules.iptables.text import FILTER, NAT

PROXY = "kube-proxy"
STANDARD_INPUT = "-"
LARGE = 2 << 20
"""Bytes of rules and of manifests that take as long to decode as a process costs, many times over."""

_BEGINNING = 1 << 16
_OBJECTS = re.compile(rb"""\A\s*\{|^(?:- +)?["']?apiVersion["']?[ \t]*:""", re.MULTILINE)
"""What begins as JSON, and a line that objects in YAML begin with and no program that lists rules prints."""
_GET_TABLE = 1
_NAME = 1
_TABLES = {family: name for name, family in FAMILIES.items()}
_CHAINS = ("KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-SVC-", "KUBE-SEP-")


class Found(NamedTuple):
    """One family of one proxy's rules."""

    where: str
    """`this node`, or the file."""
    dataplane: str
    """By what the kernel has them: `nftables`, `iptables-nft`, `iptables-legacy`, `iptables`, `ipvs`."""
    reading: Reading

    @property
    def title(self) -> str:
        """For people: `kube-proxy's iptables-nft rules`."""
        return f"{PROXY}'s {self.dataplane} rules"


class Files(NamedTuple):
    """What was given with -f, by what is in it."""

    manifests: str
    """One file or directory; empty: none."""
    rules: tuple[str, ...]


def sort_files(names: Iterable[str]) -> Files:
    """Tell files of rules from manifests, by their content.

    Raises:
        ValueError: more manifests than one file or directory were given.
    """
    manifests: list[str] = []
    rules: list[str] = []
    for name in names:
        (rules if _is_rules(name) else manifests).append(name)
    if len(manifests) > 1:
        raise ValueError(
            f"of manifests, -f takes one file or directory: {' and '.join(manifests)} are no rules "
            "(iptables-save, nft list ruleset, nft -j list ruleset, ipvsadm -Sn, ipset save, ip -j addr)"
        )
    return Files(manifests[0] if manifests else "", tuple(rules))


def from_files(names: Iterable[str]) -> list[Found]:
    """The rules in files; `-` is standard input.

    Raises:
        ForeignError: a file has none, or cannot be read; the message names it.
    """
    gathered = detect.Gathered()
    for name in names:
        shown = "standard input" if name == STANDARD_INPUT else name
        try:
            gathered.add(shown, sys.stdin.buffer.read() if name == STANDARD_INPUT else Path(name).read_bytes())
        except ForeignError as error:
            raise ForeignError(f"{shown}: {error}") from None
        except OSError as error:
            raise ForeignError(f"{shown}: {error.strerror}") from None
    return [Found(each.where, each.reading.mode, each.reading) for each in gathered.readings()]


def from_node(families: Iterable[Family] = tuple(Family)) -> list[Found]:
    """The rules in this node's kernel, whatever mode they are of.

    Raises:
        ForeignError: kube-proxy has some that cannot be read.
        DataplaneError: a program failed.
    """
    wanted = tuple(families)
    return [*_nftables(wanted), *_iptables(wanted)]


def are_large(files: Files) -> bool:
    """Whether both rules and manifests are there, and take so long that two processes had better share them."""
    return (
        bool(files.manifests) and min(map(_size, (files.manifests, max(files.rules, key=_size, default="")))) >= LARGE
    )


def likely_mode(files: Files) -> str:
    """The mode that rules are of by how their first file begins; it may turn out to be another.  Empty: unknown."""
    try:
        with Path(files.rules[0]).open("rb") as file:
            return detect.likely_mode(file.read(_BEGINNING))
    except (IndexError, OSError):
        return ""


def _size(name: str) -> int:
    try:
        path = Path(name)
        return sum(each.stat().st_size for each in (path.iterdir() if path.is_dir() else (path,)))
    except OSError:
        return 0


def addresses(text: str) -> tuple[Address, ...]:
    """Addresses in a list with commas.

    Raises:
        ValueError: one is none.
    """
    return tuple(lenient_address(each.strip()) for each in text.split(",") if each.strip())


def on_node(node: Surroundings) -> bool:
    """Whether another service proxy has rules here, by the names of chains alone."""
    return any(chain.table == TABLE or chain.name.startswith(_CHAINS) for chain in node.chains)


def without_them(node: Surroundings) -> Surroundings:
    """The node beside these rules: what is left to be a cause of trouble."""
    others = tuple(chain for chain in node.chains if chain.table != TABLE and not chain.name.startswith("KUBE-"))
    return msgspec.structs.replace(node, chains=others)


def nft_tables() -> frozenset[str]:
    """The names of all tables of nftables; what cannot be read is none."""
    from rules.netlink.attributes import DecodeError, attributes, text_of  # noqa: PLC0415  # netlink, likewise
    from rules.netlink.transaction import (  # noqa: PLC0415  # likewise
        AF_UNSPEC,
        NetfilterSocket,
        attributes_of,
        netfilter_message,
    )

    try:
        with NetfilterSocket() as socket:
            payloads = socket.dump(netfilter_message(_GET_TABLE, 0, AF_UNSPEC, b""))
            return frozenset(text_of(attributes(attributes_of(payload)), _NAME) for payload in payloads)
    except (OSError, DecodeError):
        return frozenset()


def _is_rules(name: str) -> bool:
    path = Path(name)
    try:
        if name == STANDARD_INPUT or not path.is_file():
            return False
        with path.open("rb") as file:
            beginning = file.read(_BEGINNING)
            # Lines that are whole: among the first ones of rules is one that is known, and objects begin as such.
            if detect.looks_like_rules(beginning[: beginning.rfind(b"\n") + 1] or beginning):
                return True
            return _OBJECTS.search(beginning) is None and detect.looks_like_rules(beginning + file.read())
    except OSError:
        return False  # whoever reads it as manifests says why it cannot be read


def _nftables(families: Sequence[Family]) -> Iterator[Found]:
    program = shutil.which("nft") or shutil.which("nft", path="/usr/sbin:/sbin:/usr/local/sbin")
    if program is None:
        if TABLE in nft_tables():
            raise ForeignError(
                f"{PROXY} has a table of nftables here, and nft is not there to read it: install nftables"
            )
        return
    for family in families:
        command = [program, "-j", "list", "table", _TABLES[family], TABLE]
        listed = subprocess.run(command, capture_output=True, check=False)  # noqa: S603  # found by name
        if listed.returncode:
            if b"No such file or directory" in listed.stderr:
                continue
            reason = " ".join(listed.stderr.decode(errors="replace").split())
            raise DataplaneError(f"{program} cannot list the table {TABLE} of {family.label}: {reason}")
        for table in nft_json.parse(listed.stdout):
            yield Found("this node", kube_proxy_nftables.MODE, kube_proxy_nftables.decode(table))


def _iptables(families: Sequence[Family]) -> Iterator[Found]:
    """Rules of iptables mode, and those of ipvs mode with what belongs to them."""
    found: list[Found] = []
    others: dict[Family, SavedFamily] = {}
    for family in families:
        for backend, programs in available(family).items():
            for each in saved.split(programs.saved()):
                if each.family is not family:
                    continue
                reading = None if kube_proxy_ipvs.is_meant(each) else kube_proxy_iptables.decode(each)
                if reading is not None:
                    found.append(Found("this node", f"iptables-{backend}", reading))
                elif family not in others or kube_proxy_ipvs.is_meant(each):
                    others[family] = each
    yield from found
    yield from _ipvs({family: others.get(family) for family in families}, {each.reading.table.family for each in found})


def _ipvs(rules: Mapping[Family, SavedFamily | None], others: Collection[Family]) -> Iterator[Found]:
    """What there is of ipvs mode, with its rules of iptables; `others`: families that another mode serves."""
    meant = {family for family, each in rules.items() if each is not None and kube_proxy_ipvs.is_meant(each)}
    # Without rules the sets may be there still, and the servers: somebody has flushed the rules.
    if not meant and (others or not ipvs.has_sets()):
        return
    state = ipvs.state()
    for family, each in rules.items():
        if family in meant or (family not in others and kube_proxy_ipvs.is_there(state, family)):
            kept = each or SavedFamily(family, {NAT: Chains({}), FILTER: Chains({})})
            yield Found("this node", kube_proxy_ipvs.MODE, kube_proxy_ipvs.decode(kept, state, family))
