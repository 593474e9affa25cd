"""Connections as the workers of mode userspace tell of them; see `proxy.userspace.tracing`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from proxy.trace.asked import Hear, Question, UntraceableError
from proxy.trace.ending import Ending
from proxy.trace.packets import Traced
from proxy.userspace.control import Connection, ControlError, Done, Failed, Relayed, Trace, Traces, TracesAnswer
from proxy.userspace.supervisor import running
from rules.forwarding import Protocol
from rules.netlink.headers import Headers

_PAUSE = 0.05
"""Seconds between questions to the workers."""


def packets(question: Question, ending: Ending, hear: Hear) -> Iterator[Traced]:
    """Connections as workers give them a backend, or give them up.

    Raises:
        UntraceableError: no worker can be asked.
    """
    with contextlib.ExitStack() as stack:
        workers = _asked(question, stack, hear)
        hear.ready()
        hear.note("by the workers: what has no endpoint or is not admitted is refused by the kernel, and not seen")
        left = question.bounds.packets
        ended = False
        while left and workers and not ended:
            ended = ending.wait([], _PAUSE)
            for worker in list(workers):
                for relayed in _told(worker, workers, hear):
                    if left:
                        left -= 1
                        yield traced_of(relayed, worker.index)
        if not workers:
            hear.note("no worker is left to ask")


def _asked(question: Question, stack: contextlib.ExitStack, hear: Hear) -> list[Connection]:
    """The workers that tell; each family is a conversation of its own."""
    found = []
    why = "none runs in this network namespace"
    for index in sorted(running()):
        for family, wanted in question.wanted.items():
            try:
                worker = stack.enter_context(contextlib.closing(Connection(index)))
                answer = worker.ask(
                    Trace(
                        family=family,
                        most=question.bounds.packets,
                        frontends=wanted.frontends,
                        address=wanted.address,
                        port=wanted.port,
                        source=wanted.source,
                    )
                )
            except ControlError as error:
                answer = Failed(str(error))
            if isinstance(answer, Done):
                found.append(worker)
            else:
                why = f"worker {index} does not tell: {answer.why if isinstance(answer, Failed) else answer}"
                hear.note(why)
                break
    if not found:
        raise UntraceableError(f"no worker can be asked: {why}")
    return found


def _told(worker: Connection, workers: list[Connection], hear: Hear) -> list[Relayed]:
    with contextlib.suppress(ControlError):
        answer = worker.ask(Traces())
        if isinstance(answer, TracesAnswer):
            return answer.connections
    workers.remove(worker)
    hear.note(f"worker {worker.index} has ended")
    return []


def traced_of(relayed: Relayed, worker: int) -> Traced:
    """One connection: the worker's own to the backend is what it became."""
    protocol = Protocol(relayed.frontend.protocol)
    before = Headers(*relayed.client, *relayed.address, protocol)
    notes = [f"{each} could not be reached" for each in relayed.tried]
    if relayed.backend is None:
        return Traced(before=before, after=before, failed=relayed.why or "it says no reason", notes=tuple(notes))
    took = f", which accepted after {relayed.seconds * 1000:.1f} ms" if relayed.seconds else ""
    notes.append(f"worker {worker} connected to {relayed.backend}{took}")
    own, port = relayed.own if relayed.own[0] else relayed.client
    after = Headers(own, port, relayed.backend.address, relayed.backend.port, protocol)
    return Traced(before=before, after=after, arrived=True, notes=tuple(notes))
