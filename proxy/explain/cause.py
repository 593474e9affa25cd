"""A likely cause of a connection that does not work."""

from __future__ import annotations

import msgspec


class Cause(msgspec.Struct, frozen=True, kw_only=True):
    """One likely cause."""

    kind: str
    """What it is, for programs: `no-slices`, `ip-forward` and so on."""
    words: str
    next: str = ""
    """The command to go on with."""
    certain: bool = False
    """Whether it alone keeps the connection from working, whatever the rules say."""
