"""What kube-proxy's ipvs mode keeps outside of iptables, as values: virtual servers, ipsets, addresses.

They come from a kernel, or from texts that `ipvs_text`, `ipset_text` and `addresses_json` read and write.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from rules.forwarding import Address, Family
from rules.ipvs import KUBE_PROXYS_DEVICE
from rules.ipvs.messages import Held, Key
from rules.netlink.ipset_messages import Element, SetType

MOST_FAULTS = 50
"""Sentences about lines that make no sense; more of them say nothing new."""


class KeptSet(NamedTuple):
    """An ipset, whatever its sizes are and whatever its elements carry."""

    type: SetType
    family: Family | None
    """None: a set of ports."""
    elements: frozenset[Element]


class State(NamedTuple):
    """Of both families; what is None is not known."""

    servers: Mapping[Key, Held] | None = None
    sets: Mapping[str, KeptSet] | None = None
    addresses: Mapping[str, tuple[Address, ...]] | None = None
    """By interface, those on kube-proxy's own device too."""
    faults: tuple[str, ...] = ()
    """What was not understood, one sentence each."""

    @property
    def own(self) -> frozenset[Address] | None:
        """The node's own addresses, as far as they are known: those on kube-proxy's device are Services' (IPVS-7)."""
        if self.addresses is None:
            return None
        others = (found for name, found in self.addresses.items() if name != KUBE_PROXYS_DEVICE)
        return frozenset(address for found in others for address in found)

    @property
    def bound(self) -> frozenset[Address] | None:
        """Those on kube-proxy's device."""
        return None if self.addresses is None else frozenset(self.addresses.get(KUBE_PROXYS_DEVICE, ()))
