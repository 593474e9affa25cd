"""Packets followed through the kernel's own rules, of nftables and of both kinds of iptables."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import msgspec

from proxy.trace.asked import Hear, Question, UntraceableError
from proxy.trace.ending import Ending
from proxy.trace.packets import Assembly, Passed, Place, Traced
from rules.forwarding import Family, family_of
from rules.iptables import trace as legacy_trace
from rules.iptables.trace import Chains, Line, decode_lines, end_of, logging_to_sockets
from rules.netlink.attributes import DecodeError
from rules.netlink.errors import NetlinkError, TransactionError
from rules.netlink.listening import Listening
from rules.netlink.transaction import NetfilterSocket
from rules.nftables.expressions import Reject, Unknown
from rules.nftables.objects import decode_rule, list_rules
from rules.nftables.trace import decode_events, listen, trace_table

_LOST = "the kernel told more than could be read"
_UNABLE = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.EPROTONOSUPPORT, errno.ENOENT, errno.EAFNOSUPPORT})
"""What a kernel says that has no nf_tables, or an old one."""


class _Heard(NamedTuple):
    """Who tells of packets."""

    listener: Listening
    log: Listening | None


class NoTracesError(UntraceableError):
    """This kernel cannot trace packets so that it ends by itself."""


def packets(question: Question, ending: Ending, hear: Hear, legacy: Mapping[Family, Chains]) -> Iterator[Traced]:
    """Packets as they are complete, at last those of which no end was told.

    Args:
        question: which.
        ending: when it ends.
        hear: is told when it begins.
        legacy: of families whose rules are of legacy iptables, all chains as they are.

    Raises:
        NoTracesError: this kernel cannot.
        UntraceableError: it may not be done, or failed.
    """
    with contextlib.ExitStack() as stack:
        # First of all: it forks, and no socket of the trace may be held by anybody else.
        log = _log(stack, hear, legacy)
        try:
            listener = stack.enter_context(listen())
            owner = stack.enter_context(NetfilterSocket())
            name = f"sluice-trace-{owner.port}"
            for family, wanted in question.wanted.items():
                owner.commit(trace_table(family, name, wanted, question.bounds.packets))
        except (TransactionError, OSError) as error:
            raise _obstacle(error) from None
        hear.ready()
        try:
            yield from _followed(
                question.bounds.packets, ending, _Heard(listener, log), Assembly(name, question.whose), legacy
            )
        except OSError as error:
            raise UntraceableError(str(error)) from None
        if listener.lost or (log is not None and log.lost):
            hear.note(f"{_LOST}: packets are missing")


def _log(stack: contextlib.ExitStack, hear: Hear, legacy: Mapping[Family, Chains]) -> Listening | None:
    """What legacy iptables says of its rules; None: nothing has to, or can, be heard."""
    if not legacy:
        return None
    try:
        # The kernel loads the logger when somebody listens, and not when it is chosen.
        legacy_trace.listen().close()
        stack.enter_context(logging_to_sockets(legacy))
        return stack.enter_context(legacy_trace.listen())
    except OSError as error:
        why = "another process reads nfnetlink_log's group 0" if error.errno == errno.EBUSY else str(error)
        hear.note(f"which rules of legacy iptables packets meet cannot be told ({why}); what becomes of them can")
        return None


def _followed(
    left: int, ending: Ending, heard: _Heard, assembly: Assembly, legacy: Mapping[Family, Chains]
) -> Iterator[Traced]:
    listener, log = heard
    sockets = [listener, log] if log is not None else [listener]
    ended = False
    while left and not ended:
        ended = ending.wait(sockets)
        for traced in _complete(heard, assembly, legacy):
            yield traced
            left -= 1
            if not left:
                return
    for traced in assembly.rest()[:left]:
        yield msgspec.structs.replace(traced, notes=(_LOST,)) if listener.lost else traced


def _complete(heard: _Heard, assembly: Assembly, legacy: Mapping[Family, Chains]) -> Iterator[Traced]:
    """The packets that are complete with what waits."""
    listener, log = heard
    waiting = list(listener.waiting())  # all: what is not read now is missing at the end
    # A packet's lines were told before its last event was: with all lines that wait now, it lacks none.
    for datagram in log.waiting() if log is not None else ():
        for line in decode_lines(datagram):
            yield from assembly.passed(_passed(line, legacy))
    for datagram in waiting:
        for event in decode_events(datagram):
            yield from assembly.add(event)


def _passed(line: Line, legacy: Mapping[Family, Chains]) -> Passed:
    family = family_of(line.headers.destination)
    end, number = end_of(line, legacy.get(family, {}))
    return Passed(line.headers, Place(family.af, line.table, line.chain, number, end), bool(end))


def rejects(place: Place) -> bool:
    """Whether a rule in the kernel refuses by ICMP; a rule that is gone counts as one that drops."""
    try:
        family = next(family for family in Family if family.af == place.family)
        with NetfilterSocket() as reader:
            listed = [decode_rule(each)[1] for each in reader.dump(list_rules(family, place.table))]
    except (StopIteration, NetlinkError, DecodeError):
        return False
    return any(
        each.handle == place.handle
        and any(
            # In tables of iptables-nft it may be iptables' own target.
            isinstance(one, Reject) or (isinstance(one, Unknown) and one.name == "target" and b"REJECT" in one.raw)
            for one in each.rule.expressions
        )
        for each in listed
    )


def _obstacle(error: TransactionError | OSError) -> UntraceableError:
    codes = {each.errno for each in error.errors} if isinstance(error, TransactionError) else {error.errno}
    if codes & {errno.EPERM, errno.EACCES}:
        return UntraceableError("it takes CAP_NET_ADMIN in this network namespace: run it as root")
    if codes & _UNABLE:
        return NoTracesError(
            f"this kernel cannot trace so that it ends by itself (that takes Linux 5.12 with nf_tables): {error}"
        )
    return UntraceableError(str(error))
