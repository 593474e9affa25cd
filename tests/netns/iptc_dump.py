"""What python-iptables reads of the legacy IPv4 tables nat and filter, as JSON; to be run as a program.

It shares nothing with our own reading: it asks the kernel by way of libiptc, not by iptables-save.  One process reads
one family: python-iptables breaks NAT targets where a process uses both.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import iptc


def dump() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """All rules, by table and chain."""
    return {
        name: {chain.name: [rule_of(rule) for rule in chain.rules] for chain in iptc.Table(name).chains}
        for name in ("nat", "filter")
    }


def rule_of(rule: iptc.Rule) -> dict[str, Any]:
    """A rule in plain values; a parameter that is negated begins with `!`."""
    return {
        "source": rule.src,
        "destination": rule.dst,
        "protocol": rule.protocol,
        "interface": rule.in_interface,
        "matches": [[match.name, match.get_all_parameters()] for match in rule.matches],
        "target": rule.target.name,
        "parameters": rule.target.get_all_parameters(),
        "goto": bool(rule.target.goto),
    }


if __name__ == "__main__":
    json.dump(dump(), sys.stdout)
