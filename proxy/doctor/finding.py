"""One thing that `sluice doctor` finds."""

from __future__ import annotations

from typing import Literal

import msgspec

Severity = Literal["critical", "error", "warning", "note"]

WORST_FIRST: tuple[Severity, ...] = ("critical", "error", "warning", "note")
"""All connections fail; those to one Service, or the kernel is not what it should be; some may; worth knowing."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is wrong, or worth knowing."""

    severity: Severity
    subject: str
    """`node`, `agent`, `IPv4`, `Service namespace/name` and so on."""
    kind: str
    """What it is, for programs: that of the cause, or `agent-absent`, `drift` and so on."""
    what: str
    next: str = ""
    """The command to go on with."""


def subject_of(label: str) -> str:
    """Whose trouble a route's is."""
    return f"Service {label.partition(':')[0]}" if "/" in label else label
