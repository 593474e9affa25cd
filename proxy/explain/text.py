"""Answers in words, for people.

The steps are for a newcomer; the clause of the behaviour document at the end of a line is for experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from proxy.explain.answer import Answer, Answers, Unused
from proxy.explain.cause import Cause
from proxy.explain.evidence import Evidence
from rules.explanation import Explanation, Reaches, Rejected, Share, Untouched, name_of, verdict
from rules.forwarding import Kind, Protocol, format_address

WIDTH = 104
"""Where clauses stand, unless the words are longer."""
MOST_ENDPOINTS = 20
"""How many endpoints are shown of each sort; JSON has all."""

_KINDS = {
    Kind.CLUSTER_IP: "ClusterIP",
    Kind.EXTERNAL_IP: "external IP",
    Kind.LOAD_BALANCER: "load balancer",
    Kind.NODE_PORT: "node port",
}


def lines(answers: Answers) -> Iterator[str]:
    """Everything, line by line."""
    yield f"According to {answers.evidence.words}:"
    yield from _overview(answers)
    for answer in answers.answers:
        yield ""
        yield from _answer(answer, answers.evidence)
    for missing in answers.missing:
        yield ""
        yield f"{missing}."


def _overview(answers: Answers) -> Iterator[str]:
    """Of several frontends a line each, what fails first."""
    found = answers.answers
    if len(found) < 2:
        return
    failing = sum(not each.works for each in found)
    yield ""
    fail = f"{failing} of which fail{'s' if failing == 1 else ''}"
    yield f"{len(found)} frontends, {fail if failing else 'all of which work'}:"
    for each in sorted(found, key=lambda each: each.works):
        word = "works" if each.works else "FAILS"
        why = "" if each.works else f": {_reason(each, relayed=answers.evidence.relayed)}"
        yield f"  {word}  {_heading(each)}, from {_client(each.explanation)}{why}"


def _reason(answer: Answer, *, relayed: bool) -> str:
    """Why a connection fails, as short as can be."""
    sure = next((cause.words for cause in answer.causes if cause.certain), "")
    return sure or _verdict(answer.explanation, relayed=relayed)


def _answer(answer: Answer, evidence: Evidence) -> Iterator[str]:
    explanation = answer.explanation
    yield f"{_heading(answer)}, from {_client(explanation)}"
    if answer.disagreements:
        yield "  What the kernel holds is NOT what is wanted here:"
        yield from (f"    ! {each}" for each in answer.disagreements)
    for number, step in enumerate(explanation.steps, 1):
        yield _with_clause(f"  {number:>2}. {sentence(step.words)}", step.clause)
    outcome = explanation.outcome
    if isinstance(outcome, Reaches):
        yield "  Backends:"
        yield from _capped([_share(share, answer) for share in outcome.shares])
    if answer.unused:
        yield "  Endpoints that are not used:"
        yield from _capped([_unused(each) for each in answer.unused])
    yield f"  {_conclusion(answer, relayed=evidence.relayed)}"
    for other in answer.others:
        yield f"    From {_other_client(other)}, a connection {_verdict(other, relayed=evidence.relayed)}."
    yield from _causes(answer, evidence)


def sentence(words: str) -> str:
    """Words with a capital letter at the beginning, unless they begin with an address."""
    return words if ":" in words.partition(" ")[0] else f"{words[:1].upper()}{words[1:]}"


def _heading(answer: Answer) -> str:
    route = answer.explanation.route
    kind = f" ({_KINDS[route.kind]})" if route is not None else ""
    return f"{answer.label}  {answer.asked}{kind}".lstrip()


def _client(explanation: Explanation) -> str:
    packet = explanation.packet
    if packet.source is None:
        return (packet.origin or explanation.origin).words
    by = f" by {packet.interface}" if packet.interface else ""
    return f"{format_address(packet.source)}{by} ({explanation.origin.words})"


def _other_client(explanation: Explanation) -> str:
    packet, route = explanation.packet, explanation.route
    who = (packet.origin or explanation.origin).words
    among = isinstance(explanation.outcome, Reaches) and packet.source is None and route is not None
    return f"{who} in the source ranges" if among and route is not None and route.source_ranges else who


def _with_clause(words: str, clause: str) -> str:
    return f"{words:<{WIDTH}}  [{clause}]"


def _share(share: Share, answer: Answer) -> str:
    node = answer.nodes.get(str(share.backend), "")
    where = f"  on {node}" if node else ""
    source = "masqueraded" if share.masqueraded else "source kept"
    return f"    {_percent(share.probability):>6}  {share.backend}{where}  {source}"


def _percent(probability: float) -> str:
    return f"{round(probability * 100, 1):g} %"


def _unused(each: Unused) -> str:
    where = f"  on {each.node}" if each.node else ""
    return _with_clause(f"            {each.endpoint}{where}  {each.words}", each.clause)


def _verdict(explanation: Explanation, *, relayed: bool) -> str:
    """What becomes of a connection; a process that carries connections refuses one of TCP by a reset."""
    words = verdict(explanation.outcome)
    if relayed and isinstance(explanation.outcome, Rejected) and explanation.packet.protocol is Protocol.TCP:
        return "is refused (TCP reset)"
    return words


def _conclusion(answer: Answer, *, relayed: bool) -> str:
    outcome = answer.explanation.outcome
    ended = f"the connection {_verdict(answer.explanation, relayed=relayed)}."
    if answer.works:
        # What others' rules do is not looked at one by one.
        return f"{'It works' if not answer.causes else 'By these rules it works'}: {ended}"
    if isinstance(outcome, Untouched):
        return f"It does not go to a Service: {ended}"
    if isinstance(outcome, Reaches):
        route = answer.explanation.route
        if route is not None and route.label != answer.label:
            return f"It does not go to {answer.label} but to {name_of(route)}: {ended}"
        drifted = any(cause.kind == "drift" for cause in answer.causes)
        return f"It does not work, although by {'what is wanted' if drifted else 'the rules'} {ended}"
    return f"It does not work: {ended}"


def _causes(answer: Answer, evidence: Evidence) -> Iterator[str]:
    hints = list(_hints(answer, relayed=evidence.relayed)) if evidence.live and answer.works else []
    if not answer.causes and not hints:
        return
    yield "  If it fails all the same:" if answer.works else "  Likely causes, and what to do next:"
    for cause in [*_by_certainty(answer.causes), *hints]:
        yield f"    - {cause.words}"
        if cause.next:
            yield f"        {cause.next}"


def _hints(answer: Answer, *, relayed: bool) -> Iterator[Cause]:
    """Where to look on this node, when nothing is known to be wrong."""
    label, packet = answer.label, answer.explanation.packet
    which = f"--service {label}" if label else f"--address {format_address(packet.destination)} --port {packet.port}"
    if packet.protocol is Protocol.UDP and not relayed:
        words = "a UDP client that keeps its socket keeps its backend too, whatever became of that"
        yield Cause(kind="flows", words=words, next=f"sluice conntrack --service {label}" if label else "")
    outcome = answer.explanation.outcome
    if isinstance(outcome, Reaches) and packet.protocol is Protocol.TCP:
        backend = outcome.shares[0].backend
        words = "whether the backend answers by itself: a targetPort at which no container listens refuses clients"
        command = f"nc -vz -w 3 {format_address(backend.address)} {backend.port}"
        yield Cause(kind="backend", words=words, next=command)
    words = "what rules of others do with it, and whether it leaves the node, its own packets show"
    if relayed:
        words = "whether a worker takes it up, and which backends it tries, the workers tell"
    yield Cause(kind="trace", words=words, next=f"sluice trace {which}")


def _by_certainty(causes: Sequence[Cause]) -> list[Cause]:
    return sorted(causes, key=lambda cause: not cause.certain)


def _capped(items: Sequence[str]) -> Iterator[str]:
    yield from items[:MOST_ENDPOINTS]
    if len(items) > MOST_ENDPOINTS:
        yield f"            and {len(items) - MOST_ENDPOINTS} more  (-o json has all)"
