"""What the kernel means when it refuses a transaction: whose fault that is, and how to say it.

A refusal is one of these, and each asks for something else:

* The node is short of something (memory, privilege, room in a set).  No other transaction would fare better: report.
* What was read is not what is there (an element exists, or doesn't, against the reading): read again.
* The kernel lacks a feature of the static part: report which.
* One Service's element is bad: leave that Service out, so that the others are served.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rules.dataplane import DataplaneError, UnavailableError
from rules.forwarding import Family, Frontend
from rules.netlink.attributes import HEAD, HEADER, DecodeError, attribute_list, attributes, pad, text_of
from rules.netlink.errors import Failure, TransactionError
from rules.nftables.describe import describe_message
from rules.nftables.messages import decode_elements, key_at
from rules.nftables.model import Model

_NODE = frozenset(
    {errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN, errno.EINTR, errno.EPERM, errno.EACCES, errno.ENFILE, errno.EMFILE}
)
"""Errors that say something about the node, and nothing about the message at which they came up."""
_ELSEWHERE = frozenset({errno.EEXIST, errno.ENOENT})
"""Errors of something that is there, or isn't, other than it was read; or else of a feature that is missing."""
_LACKING = frozenset({errno.ENOENT, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT})
"""Errors by which a kernel says that it does not know something."""

_NEW_TABLE, _NEW_CHAIN, _NEW_RULE = 0, 3, 6
_RULE_EXPRESSIONS = 4
_EXPRESSION_NAME = 1
_CHAIN_HOOK, _CHAIN_TYPE = 4, 7

_OPTIONS = {
    "ct": "CONFIG_NFT_CT",
    "fib": "CONFIG_NFT_FIB_{family}",
    "hash": "CONFIG_NFT_HASH",
    "masq": "CONFIG_NFT_MASQ",
    "nat": "CONFIG_NFT_NAT",
    "numgen": "CONFIG_NFT_NUMGEN",
    "reject": "CONFIG_NFT_REJECT_{family}",
}
"""Where a kernel's configuration has the expressions that may be missing beside nftables itself."""


class Step(NamedTuple):
    """One message of a transaction, and where it comes from."""

    message: bytes
    set: str = ""
    """The set whose elements it adds or deletes; empty for the static part."""


class Culprits(NamedTuple):
    """Who is left out so that the others can be served."""

    frontends: dict[Frontend, str]
    """Each with what the kernel said."""
    keys: frozenset[tuple[str, bytes]]
    """The elements (set, key) that it refused."""


def is_of_the_node(failures: Iterable[Failure]) -> bool:
    """Whether the node cannot do it now, whatever is written."""
    return any(failure.message < 0 or failure.errno in _NODE for failure in failures)


def contradicts_reading(failures: Iterable[Failure]) -> bool:
    """Whether something was refused because it is there, or not there, other than it was read."""
    return any(failure.errno in _ELSEWHERE for failure in failures)


def culprits_of(failures: Sequence[Failure], steps: Sequence[Step], model: Model) -> Culprits | None:
    """The frontends whose elements were refused; None: not all failures are those of elements that somebody has."""
    words: dict[tuple[str, bytes], str] = {}
    for failure in failures:
        name = _set_of(failure, steps)
        key = _key(failure, steps[failure.message].message) if name else None
        if key is None:
            return None
        words[name, key] = explain(failure, steps)
    owners = model.owners(words.keys())
    if not all(owners.values()):
        return None
    return Culprits(
        {frontend: words[key] for key, frontends in owners.items() for frontend in frontends}, frozenset(words)
    )


def unnamed(failures: Iterable[Failure], steps: Sequence[Step]) -> set[str]:
    """The sets of which an element was refused, and the kernel did not say which."""
    return {_set_of(failure, steps) for failure in failures if not failure.offset} - {""}


def refusal(
    error: TransactionError, steps: Sequence[Step], family: Family, *, complete: bool = False
) -> DataplaneError:
    """The error to raise; `complete`: the transaction makes the whole static part, so that nothing of it is missing."""
    if complete:
        for failure in error.errors:
            feature = lacking(failure, steps, family)
            if feature:
                return UnavailableError(f"nftables ({family.label}): this kernel lacks {feature}")
    said = [explain(failure, steps) for failure in error.errors]
    more = f" and {len(said) - 3} more" if len(said) > 3 else ""
    return DataplaneError(f"the kernel refused a change of nftables ({family.label}): {'; '.join(said[:3])}{more}")


def explain(failure: Failure, steps: Sequence[Step]) -> str:
    """What was refused, and in the kernel's words why."""
    reason = os.strerror(failure.errno) + (f" ({failure.text})" if failure.text else "")
    if not 0 <= failure.message < len(steps):
        return reason
    step = steps[failure.message]
    return f"{f'elements of {step.set}' if step.set else describe_message(step.message)}: {reason}"


def lacking(failure: Failure, steps: Sequence[Step], family: Family) -> str:
    """The feature that the kernel lacks, if a failure of the static part says so; empty: it does not."""
    if failure.errno not in _LACKING or not 0 <= failure.message < len(steps) or steps[failure.message].set:
        return ""
    message = steps[failure.message].message
    try:
        kind = HEADER.unpack_from(message)[1] & 0xFF
        if kind == _NEW_TABLE:
            return f"tables of {family.label}"
        if kind == _NEW_CHAIN:
            found = attributes(message[HEADER.size + 4 :])
            return f"{family.label} chains of type {text_of(found, _CHAIN_TYPE)}" if _CHAIN_HOOK in found else ""
        if kind == _NEW_RULE:
            return _expression(message, failure.offset, family)
    except DecodeError:
        pass
    return ""


def _expression(message: bytes, offset: int, family: Family) -> str:
    """The expression of a rule in which the byte at `offset` lies; without an offset all that may be missing."""
    start = HEADER.size + 4
    for kind, content in attribute_list(message[start:]):
        start += HEAD.size
        if kind != _RULE_EXPRESSIONS:
            start += len(pad(content))
            continue
        names: list[str] = []
        for _, expression in attribute_list(content):
            name = text_of(attributes(expression), _EXPRESSION_NAME)
            if start <= offset < start + HEAD.size + len(expression):
                return _with_option(name, family)
            names.append(name)
            start += HEAD.size + len(pad(expression))
        candidates = [_with_option(name, family) for name in dict.fromkeys(names) if name in _OPTIONS]
        return f"one of {', '.join(candidates)}" if len(candidates) > 1 else "".join(candidates)
    return ""


def _with_option(name: str, family: Family) -> str:
    option = _OPTIONS.get(name, "CONFIG_NF_TABLES").format(family=family.label.upper())
    return f"the expression {name} ({option})"


def _key(failure: Failure, message: bytes) -> bytes | None:
    if failure.offset:
        return key_at(message, failure.offset)
    elements = decode_elements([message[HEADER.size :]])
    return elements[0].key if len(elements) == 1 else None


def _set_of(failure: Failure, steps: Sequence[Step]) -> str:
    return steps[failure.message].set if 0 <= failure.message < len(steps) else ""
