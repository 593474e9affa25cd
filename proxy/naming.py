"""How people name a Service: with the kind before it, as kubectl takes it and prints it, or without."""

from __future__ import annotations

import re

KIND = r"(?:svc|services?)"
"""What kubectl calls a Service, as a pattern."""
_OF_KIND = re.compile(rf"(?:(?P<namespace>[^/:]+)/)?{KIND}/(?P<name>[^/]+)")


def without_kind(text: str) -> str:
    """`web` of `svc/web`, `shop/web` of `shop/svc/web`; other texts as they are."""
    found = _OF_KIND.fullmatch(text)
    if found is None:
        return text
    return f"{found['namespace']}/{found['name']}" if found["namespace"] else found["name"]
