"""Rules saved elsewhere, whatever wrote them: told by what is in them, and decoded.  Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rules.foreign import kube_proxy_iptables, kube_proxy_nftables, nft_json, nft_text, saved
from rules.foreign.gathering import ForeignError, Reading
from rules.foreign.nft_model import TABLE

_NFT_JSON = re.compile(rb'\s*\{\s*"nftables"\s*:\s*\[')
_FORMS = "what iptables-save, nft list ruleset or nft -j list ruleset prints"


def looks_like_rules(data: bytes) -> bool:
    """Whether some bytes are rules rather than, say, manifests; they may still be nobody's, or broken."""
    if _is_json(data):
        return _NFT_JSON.match(data) is not None
    text = data.decode(errors="replace")
    return saved.looks_saved(text) or nft_text.looks_listed(text)


def readings(data: bytes) -> Sequence[Reading]:
    """What kube-proxy's rules in a file come to: one reading for each mode and family of which there is something.

    Raises:
        ForeignError: it is no file of rules, or has none of kube-proxy's; the message says which and what to do.
    """
    if _is_json(data):
        found = [kube_proxy_nftables.decode(table) for table in nft_json.parse(data)]
        if not found:
            raise ForeignError(f"there is no table {TABLE} of ip or ip6 in it")
        return found
    text = data.decode(errors="replace")
    if saved.looks_saved(text):
        return _of_iptables(text)
    if not nft_text.looks_listed(text):
        raise ForeignError(f"it is not {_FORMS}")
    found = [kube_proxy_nftables.decode(table) for table in nft_text.parse(text)]
    if not found:
        more = ": iptables has rules of kube-proxy there, which iptables-save prints" if "KUBE-SERVICES" in text else ""
        raise ForeignError(f"there is no table {TABLE} of ip or ip6 in it{more}")
    return found


def _of_iptables(text: str) -> Sequence[Reading]:
    found = []
    for family in saved.split(text):
        reading = kube_proxy_iptables.decode(family)
        if reading is not None:
            found.append(reading)
    if not found:
        raise ForeignError("kube-proxy has no rules in it")
    return found


def _is_json(data: bytes) -> bool:
    return data.lstrip()[:1] == b"{"
