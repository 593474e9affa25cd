"""What a kernel refuses: errors as it answers with them, and the exceptions that they become."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from rules.netlink.attributes import ERROR, HEADER, U32, DecodeError, Message, attributes

_ACK_CAPPED = 0x100
_ACK_ATTRIBUTES = 0x200
_ERROR_TEXT = 1
_ERROR_OFFSET = 2


class Failure(NamedTuple):
    """One message that the kernel refused."""

    message: int
    """Its place in the list that was given to `commit`; -1: the batch as a whole."""
    errno: int
    text: str
    """The kernel's own explanation; often empty."""
    offset: int
    """Where in the message the offending attribute starts, counted from the message's header; 0: unknown."""

    def __str__(self) -> str:
        where = f"message {self.message}" if self.message >= 0 else "the transaction"
        explanation = f" ({self.text})" if self.text else ""
        return f"{where}: {os.strerror(self.errno)}{explanation}"


class TransactionError(Exception):
    """The kernel refused a transaction and applied nothing of it."""

    def __init__(self, errors: Sequence[Failure]) -> None:
        self.errors = tuple(errors)
        shown = "; ".join(str(each) for each in self.errors[:3])
        more = f" and {len(self.errors) - 3} more" if len(self.errors) > 3 else ""
        super().__init__(f"{shown}{more}")


class StaleGenerationError(TransactionError):
    """Another process changed nftables since the generation that the transaction rests on."""


class LostAnswerError(TransactionError):
    """The kernel could not queue its answers: whether the transaction was applied has to be read."""


class NetlinkError(OSError):
    """A request or a dump was refused; `errno` says why."""


_MOST = 0x7FFFFFFF
"""The highest number that `os.strerror` takes; the kernel's own end at 4095."""


def failure(place: int, answer: Message) -> Failure:
    """A refused message, from the error with which it was answered, and its place."""
    return Failure(place, error_code(answer.payload), *_details(answer))


def error_code(payload: bytes) -> int:
    """The errno of an error message, or of the end of a dump; 0: it is an acknowledgement."""
    code = -int.from_bytes(payload[:4], "little" if U32.pack(1)[0] else "big", signed=True)
    return min(code, _MOST)


def raise_refusal(answer: Message) -> None:
    """Raise NetlinkError unless an error message, or the end of a dump, says that all is well."""
    code = error_code(answer.payload)
    if code:
        raise NetlinkError(code, _explanation(answer) or os.strerror(code))


def _details(answer: Message) -> tuple[str, int]:
    """Text and offset that the kernel added to an error, if any."""
    if not answer.flags & _ACK_ATTRIBUTES or len(answer.payload) < 4 + HEADER.size:
        return "", 0
    (length,) = U32.unpack_from(answer.payload, 4)
    skipped = HEADER.size if answer.flags & _ACK_CAPPED else length + 3 & ~3
    try:
        found = attributes(answer.payload[4 + skipped :])
    except DecodeError:
        return "", 0
    text = found.get(_ERROR_TEXT, b"").rstrip(b"\0").decode(errors="replace")
    offset = found.get(_ERROR_OFFSET, b"")
    return text, U32.unpack(offset)[0] if len(offset) == U32.size else 0


def _explanation(answer: Message) -> str:
    return _details(answer)[0] if answer.kind == ERROR else ""
