"""A netfilter socket that misbehaves to order, in front of the kernel's real one.

    socket = FaultySocket()
    dataplane = NftablesDataplane(Family.IPV4)
    socket.take_over(dataplane)
    socket.commits.append(Lost(applied=True))
    socket.refuse = refuse_elements(b"...", errno.EINVAL)

Each item of `commits`, `dumps` and `requests` is the fate of one call, first to last; a call without one is served.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from rules.netlink.attributes import HEAD, HEADER, attribute_list, attributes, pad, text_of
from rules.netlink.errors import Failure, LostAnswerError, NetlinkError, StaleGenerationError, TransactionError
from rules.netlink.transaction import NetfilterSocket

NEW_CHAIN, NEW_RULE, NEW_SET, NEW_ELEMENT = (10 << 8 | kind for kind in (3, 6, 9, 12))

Refusal = Callable[[bytes], Failure | None]
"""Given a message: how the kernel refuses it (its place is filled in), or None."""


class Stale(NamedTuple):
    """Somebody changed nftables meanwhile; a transaction that rests on no generation goes through."""


class Lost(NamedTuple):
    """The kernel's answers are lost: of a transaction that was applied, or of one that was not."""

    applied: bool


class Unsent(NamedTuple):
    """`send` or `recv` itself fails."""

    errno: int


class Refused(NamedTuple):
    """The transaction is refused as a whole, or at one message."""

    errno: int
    message: int = -1


class Meddle(NamedTuple):
    """Somebody does something just before; then the call is served."""

    act: Callable[[], object]


Fate = Stale | Lost | Unsent | Refused | Meddle | None


class FaultySocket(NetfilterSocket):
    def __init__(self) -> None:
        super().__init__()
        self.commits: list[Fate] = []
        self.dumps: list[Fate] = []
        self.requests: list[Fate] = []
        self.refuse: Refusal | None = None
        """Asked for every message of every transaction."""
        self.attempts: list[int] = []
        """How many messages each transaction had."""

    def take_over(self, dataplane: Any) -> None:
        """Be the dataplane's socket from now on."""
        dataplane._socket.close()
        dataplane._socket = self

    def commit(self, messages: Sequence[bytes], generation: int | None = None) -> None:
        if not messages:
            return
        self.attempts.append(len(messages))
        match self.commits.pop(0) if self.commits else None:
            case Stale() if generation is not None:
                raise StaleGenerationError([Failure(-1, errno.ERESTART, "", 0)])
            case Lost(applied):
                if applied:
                    super().commit(messages, generation)
                raise LostAnswerError([Failure(-1, errno.ENOBUFS, "", 0)])
            case Unsent(code):
                raise OSError(code, os.strerror(code))
            case Refused(code, place):
                raise TransactionError([Failure(place, code, "", 0)])
            case Meddle(act):
                act()
        if self.refuse is not None:
            failures = [
                failure._replace(message=place)
                for place, message in enumerate(messages)
                if (failure := self.refuse(message)) is not None
            ]
            if failures:
                raise TransactionError(failures)
        super().commit(messages, generation)

    def dump(self, message: bytes) -> list[bytes]:
        self._befall(self.dumps)
        return super().dump(message)

    def request(self, message: bytes) -> bytes:
        self._befall(self.requests)
        return super().request(message)

    def _befall(self, fates: list[Fate]) -> None:
        match fates.pop(0) if fates else None:
            case Unsent(code):
                raise OSError(code, os.strerror(code))
            case Refused(code):
                raise NetlinkError(code, os.strerror(code))
            case Meddle(act):
                act()


# --- refusals -------------------------------------------------------------------------------------------------


def refuse_elements(keys: Collection[bytes], code: int, *, name: str = "", kind: int = NEW_ELEMENT) -> Refusal:
    """As the kernel does: of a message, the first element with one of these keys is named by its offset."""

    def refuse(message: bytes) -> Failure | None:
        for offset, key, _ in elements_of(message, name, kind) if _mentions(message, keys) else ():
            if key in keys:
                return Failure(0, code, "", offset)
        return None

    return refuse


def refuse_backends(data: Collection[bytes], code: int) -> Refusal:
    """Elements that lead to one of these."""

    def refuse(message: bytes) -> Failure | None:
        for offset, _, value in elements_of(message, "", NEW_ELEMENT) if _mentions(message, data) else ():
            if value in data:
                return Failure(0, code, "", offset)
        return None

    return refuse


def refuse_set(name: str, code: int) -> Refusal:
    """Every element of a set: it has no room."""

    def refuse(message: bytes) -> Failure | None:
        found = next(elements_of(message, name, NEW_ELEMENT), None)
        return Failure(0, code, "", found[0]) if found else None

    return refuse


def refuse_expression(
    name: str, code: int = errno.ENOENT, *, offsets: bool = True, family: int | None = None
) -> Refusal:
    """Rules with an expression, as a kernel without it does; `offsets`: whether it says where."""

    def refuse(message: bytes) -> Failure | None:
        if HEADER.unpack_from(message)[1] != NEW_RULE or family not in (None, message[HEADER.size]):
            return None
        start = HEADER.size + 4
        for kind, content in attribute_list(message[start:]):
            start += HEAD.size
            if kind == 4:
                for _, expression in attribute_list(content):
                    if text_of(attributes(expression), 1) == name:
                        return Failure(0, code, "", start if offsets else 0)
                    start += HEAD.size + len(pad(expression))
                return None
            start += len(pad(content))
        return None

    return refuse


def refuse_kind(kind: int, code: int, *, family: int | None = None) -> Refusal:
    """All messages of a kind."""

    def refuse(message: bytes) -> Failure | None:
        if HEADER.unpack_from(message)[1] != kind or family not in (None, message[HEADER.size]):
            return None
        return Failure(0, code, "", 0)

    return refuse


def _mentions(message: bytes, some: Collection[bytes]) -> bool:
    return any(each in message for each in some)


def elements_of(message: bytes, name: str, kind: int):
    """The elements of a message for a set (any, without a name): where each starts, its key, its data."""
    if HEADER.unpack_from(message)[1] != kind:
        return
    start = HEADER.size + 4
    parts = attribute_list(message[start:])
    if name and name != dict(parts)[2].rstrip(b"\0").decode():
        return
    for part, content in parts:
        start += HEAD.size
        if part == 3:
            for _, element in attribute_list(content):
                found = attributes(element)
                yield start, value_of(found, 1), value_of(found, 2)
                start += HEAD.size + len(pad(element))
            return
        start += len(pad(content))


def value_of(found: Any, kind: int) -> bytes:
    return attributes(found[kind]).get(1, b"") if kind in found else b""
