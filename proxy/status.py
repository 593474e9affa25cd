"""`sluice status`: the running agent in a few lines, and in an exit code.

0: the kernel holds what it should.  1: a sync fails or was never done, or drift is left.  2: no agent could be asked.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, TextIO

import msgspec

from proxy.agent_socket import AgentError
from proxy.agent_socket import status as ask
from proxy.report import FamilyReport, Followed, LastSync, Status
from rules.words import one_line

Format = Literal["text", "json"]

SHOWN = 20
"""Troubles and the like that the text shows of each kind."""
STALE = 300.0
"""Seconds of silence after which a source counts as left behind: servers are heard every few minutes at least."""


def main(format_: Format, run_directory: str, *, out: TextIO | None = None, ask: Callable[[str], Status] = ask) -> int:
    """Print how the agent is; see the head of this module for what is returned."""
    out = sys.stdout if out is None else out
    try:
        status = ask(run_directory)
    except AgentError as error:
        sys.stderr.write(f"sluice status: {error}\n")
        return 2
    if format_ == "json":
        plain = msgspec.to_builtins(status) | {"inTrouble": status.in_trouble}
        out.write(msgspec.json.format(msgspec.json.encode(plain)).decode() + "\n")
    else:
        out.writelines(f"{line}\n" for line in lines(status))
    return 1 if status.in_trouble else 0


def lines(status: Status) -> Iterator[str]:
    """The report as text."""
    yield f"sluice {status.version} on {status.node}, process {status.pid}, up {duration(status.uptime)}"
    yield _row("mode", _mode(status))
    yield _row("source", status.source.description)
    for each in status.source.followed:
        yield _row("", _followed(each))
    yield _row("objects", _objects(status))
    for family in status.families:
        head, *rest = _family(family, status.drift_policy)
        yield _row(family.family, head)
        yield from (_row("", line) for line in rest)
    yield from (_row(each.family, f"not served: {each.reason}") for each in status.unserved)
    yield from _list("trouble", (f"{each.subject}: {each.reason}" for each in status.troubles))
    yield from _list(
        "contested",
        (
            f"{each.frontend} belongs to Service {each.winner}; {', '.join(each.losers)} would be next"
            for each in status.contested
        ),
    )
    yield from _list(
        "no slices",
        (
            f"Service {each.service} selects pods by {each.selector}, and nothing says which they are: add an "
            f"EndpointSlice with the label kubernetes.io/service-name: {each.service.partition('/')[2]}, or Endpoints "
            "of its name"
            for each in status.unselected
        ),
    )
    yield from _list("note", status.notes)


def duration(seconds: float) -> str:
    """Seconds for people: `3 s`, `5 min`, `2 h 10 min`, `4 d 3 h`."""
    if seconds < 0.0095:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 0.95:
        return f"{seconds * 1000:.0f} ms"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if minutes < 120:
        return f"{minutes} min"
    if hours < 48:
        return f"{hours} h {minutes % 60} min"
    return f"{days} d {hours % 24} h"


def _mode(status: Status) -> str:
    carried = sorted({family.dataplane for family in status.families})
    dataplane = " and ".join(carried) or "none"
    if status.mode:
        return f"{dataplane}, as configured"
    return f"{dataplane}, chosen for this node as none is configured; it means what {status.behaviour} mode means"


def _followed(each: Followed) -> str:
    heard = "never heard" if each.lag is None else f"heard {duration(each.lag)} ago"
    if each.what == "files":
        heard = "never read" if each.lag is None else f"read {duration(each.lag)} ago"
    changed = f", changed {duration(each.changed)} ago" if each.changed is not None else ""
    behind = "; the node may be behind" if each.lag is not None and each.lag > STALE else ""
    error = f": {each.error}" if each.error else ""
    return f"{each.what} {each.state}, {heard}{changed}{behind}{error}"


def _objects(status: Status) -> str:
    if not status.synced:
        return "Services and EndpointSlices have not been listed yet: nothing is written before they are"
    pending = f", {status.pending_changes} changes to compute" if status.pending_changes else ""
    return f"{_count(status.services, 'Service')}, {_count(status.slices, 'EndpointSlice')}{pending}"


def _family(family: FamilyReport, policy: str) -> Iterator[str]:
    syncs = family.syncs
    if syncs.failures:
        state = f"FAILING, {_count(syncs.failures, 'time')} in a row: {syncs.error}"
    elif not syncs.count:
        state = "nothing written yet"
    elif not family.healthy:
        state = "LATE: a sync has been waiting too long"
    else:
        state = "up to date" if not syncs.pending else "a sync is due"
    yield f"{state}; {_count(family.frontends, 'frontend')} in {family.dataplane}"
    if syncs.last is not None:
        yield f"last sync {_sync(syncs.last)}"
    if syncs.refused:
        yield f"refused by the kernel: {', '.join(syncs.refused[:SHOWN])}{_more(len(syncs.refused))}"
    seen = syncs.last_drift
    if syncs.drift_left:
        yield f"DRIFT: {_count(syncs.drift_left, 'difference')} left (driftPolicy: {policy})"
    elif syncs.drift_repairs:
        yield f"drift repaired {_count(syncs.drift_repairs, 'time')}"
    if seen is not None:
        by = f" after {' and '.join(seen.by)}" if seen.by else ""
        yield f"last drift {duration(seen.ago)} ago{by}: {seen.summary}"
        yield from (f"  {line}" for line in seen.lines)


def _sync(last: LastSync) -> str:
    kind = "full" if last.full else "partial"
    return f"{duration(last.ago)} ago: {kind}, {_count(last.operations, 'operation')} in {duration(last.seconds)}"


def _list(name: str, items: Iterable[str]) -> Iterator[str]:
    texts = list(items)
    for number, text in enumerate(texts[:SHOWN]):
        yield _row(name if not number else "", text)
    if len(texts) > SHOWN:
        yield _row("", f"and {len(texts) - SHOWN} more: see -o json")


def _row(name: str, text: str) -> str:
    return f"{name:<11}{one_line(text)}".rstrip()


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _more(number: int) -> str:
    return f" and {number - SHOWN} more" if number > SHOWN else ""
