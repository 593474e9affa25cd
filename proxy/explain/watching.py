"""`sluice explain --watch`: the same question again and again, told when the answer is another.

Everything is read anew each time, as a single question would: the agent, the kernel, or the files.
"""

from __future__ import annotations

import difflib
import json
import select
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, TextIO

from proxy.explain.answer import Answers, answer, exit_code
from proxy.explain.asked import Asked, Client
from proxy.explain.data import to_data
from proxy.explain.evidence import Evidence
from proxy.explain.text import lines

PAUSE = 1.0
"""Seconds between an answer and the next question."""
CONTEXT = 0
"""Lines around those that changed: an answer says what it is about in each."""


class Clock(NamedTuple):
    """Time, and whether anybody reads, for tests to be another."""

    now: Callable[[], str]
    sleep: Callable[[float], None]
    is_alone: Callable[[TextIO], bool] = lambda _: False


def watch(
    asked: Asked,
    client: Client,
    gather: Callable[[], Evidence],
    unanswered: tuple[type[Exception], ...],
    *,
    as_json: bool,
    out: TextIO | None = None,
    clock: Clock | None = None,
) -> int:
    """Print the answer, and what is another about it whenever it is; until ^C, or until nobody reads it any more.

    Args:
        asked: what is asked about.
        client: who connects.
        gather: looks for the evidence, as often as it is called.
        unanswered: what it raises where there is none for now: that is told as an answer, and it is asked again.
        as_json: print one object a line, with the time and the whole answer.
        out: standard output unless given.
        clock: the time; the system's unless given.

    Returns 0 if the last answer was that it works, 1 if it does not, 2 if nobody could tell.
    """
    out = sys.stdout if out is None else out
    clock = clock or Clock(lambda: time.strftime("%H:%M:%S"), time.sleep, is_unread)
    before: list[str] | None = None
    code = 2
    try:
        while True:
            try:
                answers: Answers | str = answer(asked, client, gather())
            except unanswered as error:
                answers = str(error)
            code = 2 if isinstance(answers, str) else exit_code(answers)
            now = _as_json(answers) if as_json else _as_lines(answers)
            if now != before:
                for line in _objects(now, clock.now()) if as_json else _told(before, now, clock.now()):
                    out.write(f"{line}\n")
                out.flush()
                before = now
            clock.sleep(PAUSE)
            if clock.is_alone(out):
                return code
    except KeyboardInterrupt:
        return code


def is_unread(out: TextIO) -> bool:
    """Whether whoever read it has gone: `kubectl exec` leaves what it started behind, and a watch may write nothing."""
    poll = select.poll()
    try:
        poll.register(out, 0)
    except (OSError, ValueError):
        return False  # no file
    return bool(poll.poll(0))


def _as_lines(answers: Answers | str) -> list[str]:
    if isinstance(answers, str):
        return [f"Nobody can tell: {answers}"]
    return [*answers.evidence.problems, *(line.rstrip() for line in lines(answers))]


def _as_json(answers: Answers | str) -> list[str]:
    """All of it as one object."""
    return [json.dumps({"unanswered": answers} if isinstance(answers, str) else to_data(answers))]


def _objects(now: list[str], moment: str) -> Iterator[str]:
    for each in now:
        yield json.dumps({"time": moment, **json.loads(each)})


def _told(before: list[str] | None, now: list[str], moment: str) -> Iterator[str]:
    """The first answer as it is, of others what changed."""
    if before is None:
        yield from now
        return
    yield ""
    yield f"{moment}  the answer is another:"
    for line in list(difflib.unified_diff(before, now, n=CONTEXT, lineterm=""))[2:]:
        if not line.startswith("@@") and line[1:].strip():
            yield f"  {line[0]} {line[1:]}"
