"""Rules saved elsewhere, whatever wrote them: told by what is in them, and decoded.  Pure.

Of kube-proxy's ipvs mode several programs tell a part each (`parts`), so files are gathered before they are decoded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rules.foreign import (
    addresses_json,
    ipset_text,
    ipvs_text,
    kube_proxy_iptables,
    kube_proxy_ipvs,
    kube_proxy_nftables,
    nft_json,
    nft_text,
    parts,
    saved,
)
from rules.foreign.gathering import ForeignError, Reading
from rules.foreign.ipvs_state import KeptSet, State
from rules.foreign.nft_model import TABLE
from rules.foreign.saved import SavedFamily
from rules.forwarding import Address, Family
from rules.ipvs.messages import Held, Key

_NFT_JSON = re.compile(rb'\s*\{\s*"nftables"\s*:\s*\[')
_FORMS = "what iptables-save, nft list ruleset or nft -j list ruleset prints, or ipvsadm -Sn, ipset save or ip -j addr"
_NOTHING = "kube-proxy has no rules in it"


class Decoded(NamedTuple):
    """One family of one mode's rules."""

    names: tuple[str, ...]
    """Where they were found."""
    reading: Reading

    @property
    def where(self) -> str:
        """The same, for people."""
        first, *others = self.names
        return (
            first if not others else f"{first} and {len(others)} more" if len(others) > 1 else f"{first}, {others[0]}"
        )


def looks_like_rules(data: bytes) -> bool:
    """Whether some bytes are rules rather than, say, manifests; they may still be nobody's, or broken."""
    if _is_json(data):
        return _NFT_JSON.match(data) is not None
    text = data.decode(errors="replace")
    return saved.looks_saved(text) or nft_text.looks_listed(text) or parts.looks_like_parts(text)


def likely_mode(beginning: bytes) -> str:
    """The mode that rules are probably of, by their beginning, so that what depends on it need not wait for the end."""
    text = beginning.decode(errors="replace")
    if _is_json(beginning) or (nft_text.looks_listed(text) and not saved.looks_saved(text)):
        return kube_proxy_nftables.MODE
    if parts.looks_like_parts(text) or "KUBE-IPVS-" in text or "--match-set KUBE-" in text:
        return kube_proxy_ipvs.MODE
    return kube_proxy_iptables.MODE


def readings(data: bytes) -> Sequence[Reading]:
    """What kube-proxy's rules in a file come to: one reading for each mode and family of which there is something.

    Raises:
        ForeignError: it is no file of rules, or has none of kube-proxy's; the message says which and what to do.
    """
    gathered = Gathered()
    gathered.add("", data)
    return [each.reading for each in gathered.readings()]


class Gathered:
    """Files of rules, one after the other."""

    def __init__(self) -> None:
        self._decoded: list[Decoded] = []
        self._empty: list[str] = []
        """Files of iptables' rules in which there are none of kube-proxy's."""
        self._of_ipvs: list[str] = []
        """Files in which there is something of ipvs mode."""
        self._saved: dict[Family, SavedFamily] = {}
        self._servers: dict[Key, Held] | None = None
        self._sets: dict[str, KeptSet] | None = None
        self._addresses: dict[str, tuple[Address, ...]] | None = None
        self._faults: list[str] = []

    def add(self, name: str, data: bytes) -> None:
        """Take a file.

        Raises:
            ForeignError: it is no file of rules, or has none of kube-proxy's; the message does not name it.
        """
        if _is_json(data):
            self._take(name, [kube_proxy_nftables.decode(table) for table in nft_json.parse(data)])
            return
        text = data.decode(errors="replace")
        if not nft_text.looks_listed(text) or saved.looks_saved(text) or parts.looks_like_parts(text):
            self._add_text(name, text)
            return
        found = [kube_proxy_nftables.decode(table) for table in nft_text.parse(text)]
        more = ": iptables has rules of kube-proxy there, which iptables-save prints" if "KUBE-SERVICES" in text else ""
        self._take(name, found, more)

    def state(self) -> State:
        """What there is of ipvs mode beside its rules."""
        return State(self._servers, self._sets, self._addresses, tuple(self._faults))

    def readings(self, *, strict: bool = True) -> Sequence[Decoded]:
        """What all files come to; `strict`: none of them may be without rules of kube-proxy's.

        Raises:
            ForeignError: one has none, or something of its ipvs mode is missing.
        """
        ipvs = list(self._ipvs())
        if self._empty and strict and not ipvs:
            raise ForeignError(_named(self._empty[0], _NOTHING))
        if self._of_ipvs and strict and not (ipvs or self._decoded):
            raise ForeignError(_named(", ".join(self._of_ipvs), _NOTHING))
        return [*self._decoded, *ipvs]

    def _take(self, name: str, found: Sequence[Reading], more: str = "") -> None:
        if not found:
            raise ForeignError(f"there is no table {TABLE} of ip or ip6 in it{more}")
        self._decoded += (Decoded((name,), each) for each in found)

    def _add_text(self, name: str, text: str) -> None:
        found = parts.split(text)
        if not found.of_ipvs and not saved.looks_saved(text):
            raise ForeignError(f"it is not {_FORMS}")
        if found.of_ipvs:
            self._of_ipvs.append(name)
            self._add_state(found)
        if not saved.looks_saved(found.iptables):
            return
        some = False
        for family in saved.split(found.iptables):
            if kube_proxy_ipvs.is_meant(family):
                if name not in self._of_ipvs:
                    self._of_ipvs.append(name)
                self._keep(family)
                some = True
            elif (reading := kube_proxy_iptables.decode(family)) is not None:
                self._decoded.append(Decoded((name,), reading))
                some = True
            elif family.family not in self._saved:
                # Where it turns out that mode ipvs has sets for the family, its rules are gone.
                self._saved[family.family] = family
        if not some and not found.of_ipvs:
            self._empty.append(name)

    def _keep(self, family: SavedFamily) -> None:
        before = self._saved.get(family.family)
        if before is None or not kube_proxy_ipvs.is_meant(before):
            self._saved[family.family] = family
        else:
            self._faults.append(f"the rules of {family.family.label} stand there twice: the first ones are read")

    def _add_state(self, found: parts.Parts) -> None:
        if found.ipset is not None:
            sets, faults = ipset_text.parse(found.ipset)
            self._sets = {**sets, **(self._sets or {})}
            self._faults += faults
        if found.ipvsadm is not None:
            servers, faults = ipvs_text.parse(found.ipvsadm)
            self._servers = {**servers, **(self._servers or {})}
            self._faults += faults
        if found.addresses is not None:
            self._addresses = {**found.addresses, **(self._addresses or {})}

    def _ipvs(self) -> Iterator[Decoded]:
        """What there is of ipvs mode, by family; raises ForeignError."""
        state = self.state()
        # Sets stay behind when kube-proxy is given another mode.
        others = {each.reading.table.family for each in self._decoded}
        for family in Family:
            found = self._saved.get(family)
            meant = found is not None and kube_proxy_ipvs.is_meant(found)
            left = family not in others and (
                kube_proxy_ipvs.is_there(state, family)
                or (state.sets is None and any(key.family is family for key in state.servers or ()))
            )
            if meant or left:
                try:
                    yield Decoded(tuple(self._of_ipvs), kube_proxy_ipvs.decode(found, state, family))
                except ForeignError as error:
                    raise ForeignError(_named(", ".join(self._of_ipvs), str(error))) from None


def of_state(state: State) -> bytes:
    """Servers, sets and addresses as the programs print them, one after the other."""
    lines = [*ipset_text.lines(state.sets or {}), *ipvs_text.lines(state.servers or {})]
    if state.addresses is not None:
        lines.append(addresses_json.text_of(state.addresses))
    return "".join(f"{line}\n" for line in lines).encode()


def _named(name: str, sentence: str) -> str:
    return f"{name}: {sentence}" if name else sentence


def _is_json(data: bytes) -> bool:
    return data.lstrip()[:1] == b"{"
