"""Answers as values that JSON has: a contract, to which fields may be added and from which none go."""

from __future__ import annotations

from typing import Any

import msgspec

from proxy.explain.answer import Answer, Answers
from rules.explanation import Explanation, Outcome, Packet, Reaches
from rules.forwarding import format_address

VERSION = 1


def to_data(answers: Answers) -> dict[str, Any]:
    """All answers to a question."""
    return {
        "version": VERSION,
        "asked": answers.asked,
        "source": answers.evidence.source,
        "works": bool(answers.answers) and not answers.missing and all(each.works for each in answers.answers),
        "answers": [_answer(each) for each in answers.answers],
        "missing": list(answers.missing),
        "problems": list(answers.evidence.problems),
    }


def outcome_data(outcome: Outcome) -> dict[str, Any]:
    """What becomes of a connection."""
    if not isinstance(outcome, Reaches):
        kind = type(outcome).__name__.lower()
        return {"is": kind, "why": outcome.why.value}
    return {
        "is": "reaches",
        "backends": [
            {"backend": str(share.backend), "probability": share.probability, "masqueraded": share.masqueraded}
            for share in outcome.shares
        ],
        "affinitySeconds": outcome.affinity,
    }


def _answer(answer: Answer) -> dict[str, Any]:
    explanation = answer.explanation
    outcome = outcome_data(explanation.outcome)
    for backend in outcome.get("backends", ()):
        backend["node"] = answer.nodes.get(backend["backend"])
    return {
        "frontend": str(answer.asked),
        "service": answer.label,
        "kind": explanation.route.kind.value if explanation.route is not None else None,
        "works": answer.works,
        "packet": _packet(explanation.packet),
        "origin": explanation.origin.value,
        "disagreements": list(answer.disagreements),
        "steps": [
            {
                "kind": step.kind.value,
                "words": step.words,
                "clause": step.clause,
                "frontend": str(step.frontend) if step.frontend is not None else None,
                "service": step.label,
            }
            for step in explanation.steps
        ],
        "outcome": outcome,
        "unused": [msgspec.to_builtins(each) for each in answer.unused],
        "causes": [msgspec.to_builtins(each) for each in answer.causes],
        "others": [_other(each) for each in answer.others],
    }


def _other(explanation: Explanation) -> dict[str, Any]:
    return {
        "packet": _packet(explanation.packet),
        "origin": explanation.origin.value,
        "outcome": outcome_data(explanation.outcome),
    }


def _packet(packet: Packet) -> dict[str, Any]:
    return {
        "source": format_address(packet.source) if packet.source is not None else None,
        "destination": format_address(packet.destination),
        "protocol": packet.protocol.name,
        "port": packet.port,
        "interface": packet.interface or None,
    }
