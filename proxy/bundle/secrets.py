"""What could be a secret, taken out of texts and values before they are given away.

By its looks and by the name of its field: PEM, JWT, HTTP authentication, users in URLs.  What looks like nothing of the
kind stays, so somebody has to look through it all the same.
"""

from __future__ import annotations

import re
from typing import Any

_REMOVED = "[removed]"
# Logs hold runs of a million letters: each pattern looks at one once, from its beginning, and gives nothing back.
_SECRETS = (
    (re.compile(r"-----BEGIN [A-Z0-9 ]+-----.*?(-----END [A-Z0-9 ]+-----|\Z)", re.DOTALL), _REMOVED),
    (re.compile(r"(?<![\w-])(?=[\w-]*?\beyJ)[\w-]++\.[\w-]++(\.[\w-]*)?"), _REMOVED),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{6,}"), rf"\1 {_REMOVED}"),
    (re.compile(r"(?<=://)[^/\s@\"']+@"), f"{_REMOVED}@"),
    (
        re.compile(
            r"(?i)(?<![\w.-])"
            r"(?=[\w.-]*?(?:token|password|passwd|secret|client-key-data|client-certificate-data|api[_-]?key))"
            r"([\w.-]++[\"']?\s*+[=:]\s*+)(\"(?:[^\"\\]|\\.)*+\"|'[^']*'|[^\s,;}\]]+)"
        ),
        rf'\1"{_REMOVED}"',
    ),
    (
        re.compile(r"(?i)(?<![\w-])(?=\w*+-[\w-]*?(?:token|password|secret))([\w-]++[\"',\s]++)[^\s\"',]+"),
        rf"\1{_REMOVED}",
    ),
    (re.compile(r"\bLS0tLS1CRUdJTi[\w+/=]+"), _REMOVED),
)
"""PEM, JWT, HTTP authentication, users in URLs, fields and flags by their names, PEM in base 64."""


def without_secrets(text: str) -> str:
    """The text, with what could be a secret taken out."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text


def cleaned(value: Any) -> Any:
    """Plain values, each text without secrets, and none where its field's name tells one."""
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, dict):
        return {
            key: _REMOVED if isinstance(item, str) and item and _TELLS.search(str(key)) else cleaned(item)
            for key, item in value.items()
        }
    return [cleaned(item) for item in value] if isinstance(value, list) else value


_TELLS = re.compile(r"(?i)token|password|passwd|secret|(client-)?key-data|certificate-data|api[_-]?key")
