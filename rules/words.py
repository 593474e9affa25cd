"""Text for people."""

from __future__ import annotations


def one_line(text: str) -> str:
    """Text without control characters: what strangers say, and call things, must not forge lines or colours."""
    return text if text.isprintable() else "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)
