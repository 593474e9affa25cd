"""Whether what came of a probe is what its scenario expects.  Pure.

Backends are expected as a set: every one of them must be seen, and nothing else.  As connections are balanced at
random, a judgement may be that more connections are needed; `enough` says after how many a missing backend is missing
indeed, with a chance of less than one in 10^9 that it is mere bad luck.
"""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Sequence
from typing import NamedTuple

from proxy.demo import plan
from proxy.demo.probes import Outcome
from tests.scenarios.schema import Answered, Case, join

FIRST = 12
"""Connections of the first round where backends are expected."""


class Judgement(NamedTuple):
    wrong: str = ""
    """What is not as expected; empty when nothing is."""
    more: int = 0
    """Connections that are still needed."""


def enough(backends: int) -> int:
    """After how many connections every backend has been seen with a chance of failure under 10^-9."""
    if backends < 2:
        return FIRST
    return math.ceil(math.log(backends * 1e9) / -math.log1p(-1 / backends))


def first_round(case: Case) -> int:
    """How many connections to make before the first judgement."""
    return FIRST if isinstance(case.expect, Answered) else 2


def judge(case: Case, outcomes: Sequence[Outcome], *, relayed: bool = False, bound: bool = False) -> Judgement:
    """The outcomes of a case so far against its expectation.

    `relayed`: addresses of Services are the node's own, as they are in userspace mode.  Then its kernel refuses, from
    the very address and with a reset where that is due; whoever else might do so listens and would be heard.
    `bound`: they are the node's own, and nothing else is so; as in mode ipvs.
    """
    if isinstance(case.expect, Answered):
        return _judge_answers(case, case.expect, outcomes)
    how = case.expect.how
    for outcome in outcomes:
        if how == "dropped":
            right = outcome.kind == "silent"
        elif how == "refused":
            # A refusal is the node's own; that of a closed port comes from the owner of the address.
            right = outcome.refused and plan.HOST_OF.get(outcome.sender) == "node1"
            if relayed or bound:
                right = right or (outcome.refused and outcome.sender == case.target.address)
            if relayed:
                right = right or outcome.kind == "reset"
        else:
            loopback = ipaddress.ip_address(case.target.address).is_loopback
            owner = case.host if loopback else owner_of(case.target.address)
            right = outcome.host == owner and outcome.address == case.target.address and outcome.peer == outcome.local
        if not right:
            return Judgement(wrong=f"{case}: expected {how}, got: {outcome}")
    return Judgement()


def _judge_answers(case: Case, expect: Answered, outcomes: Sequence[Outcome]) -> Judgement:
    wanted = set(expect.backends)
    seen: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        name = backend_name(outcome)
        if name not in wanted:
            return Judgement(wrong=f"{case}: expected one of {', '.join(sorted(wanted))}, got: {outcome}")
        seen.setdefault(name, []).append(outcome)
    if expect.sticky and len(seen) > 1:
        return Judgement(wrong=f"{case}: expected one backend for all connections, got {', '.join(sorted(seen))}")
    for name, answers in seen.items():
        host = name.rpartition(":")[0]
        source = expect.source if isinstance(expect.source, str) else expect.source[host]
        if wrong := _judge_source(source, answers):
            return Judgement(wrong=f"{case}: {wrong}")
    missing = wanted - seen.keys()
    if missing and not expect.sticky:
        more = enough(len(wanted)) - len(outcomes)
        if more <= 0:
            return Judgement(wrong=f"{case}: {', '.join(sorted(missing))} never answered {len(outcomes)} connections")
        return Judgement(more=min(more, 2 * FIRST))
    return Judgement()


def _judge_source(source: str, answers: Sequence[Outcome]) -> str:
    """What is wrong with the sources that one backend saw, or an empty text."""
    kept = [outcome.peer == outcome.local for outcome in answers]
    own = [outcome.peer[0] == outcome.local[0] for outcome in answers]
    # The node itself keeps its address when it is masqueraded; then its port tells, save by chance: a random one may be
    # the same, and connection tracking changes one that another connection to the backend has.
    few_to_tell = len(answers) < 3 and all(own)
    if source == "kept":
        if all(own) and any(kept):
            return ""
        changed = [outcome for outcome, same in zip(answers, kept, strict=True) if not same]
        return f"expected the source kept, got: {changed[0]}" if changed else ""
    foreign = [outcome for outcome in answers if plan.HOST_OF.get(outcome.peer[0]) != "node1"]
    if foreign:
        return f"expected the source masqueraded, got: {foreign[0]}"
    return f"expected the source masqueraded, got: {answers[0]}" if all(kept) and not few_to_tell else ""


def backend_name(outcome: Outcome) -> str:
    """The backend that answered as scenarios name it; what did not answer has no name."""
    if outcome.kind != "answered":
        return ""
    host = plan.HOST_OF.get(outcome.address)
    if host is None:
        return join(outcome.address, outcome.port)
    return f"{outcome.host}:{outcome.port}" if host == outcome.host else ""


def owner_of(address: str) -> str:
    """The host that answers at an address when nobody translates it."""
    return plan.HOST_OF.get(address, "upstream")
