"""`sluice cleanup`: remove everything of ours from the kernel, and on request what kube-proxy has left (CFG-52).

It needs no configuration: every dataplane that exists is asked, in both families.  What is wrong or half removed goes
like the rest.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator

from proxy import modes, takeover
from proxy.lock import HeldError, Lock
from rules.dataplane import Dataplane, DataplaneError, UnavailableError
from rules.forwarding import Family

SLUICE, ALL = "sluice", "all"
WHOSE = (SLUICE, takeover.PROXY, ALL)
"""Whose rules may be removed."""


def main(
    whose: str = SLUICE,
    *,
    open_dataplane: Callable[[str, Family], Dataplane] = modes.open_dataplane,
    take_lock: Callable[[], Lock] = Lock,
) -> int:
    """Remove, and say what was removed, a line each; 0, or 2 if something could not be.

    Whose rules go must have ended: whoever runs would write them again.

    Args:
        whose: one of WHOSE.
        open_dataplane: opens the dataplane of a mode and a family.
        take_lock: takes the agent's lock.
    """
    failures: list[str] = []
    removed = 0
    for line in _all(whose, open_dataplane, take_lock, failures):
        sys.stdout.write(f"{line}\n")
        removed += 1
    for failure in dict.fromkeys(failures):
        sys.stderr.write(f"sluice cleanup: {failure}\n")
    if failures:
        return 2
    if not removed:
        sys.stdout.write(f"nothing of {'sluice or kube-proxy' if whose == ALL else whose} was there\n")
    return 0


def _all(
    whose: str,
    open_dataplane: Callable[[str, Family], Dataplane],
    take_lock: Callable[[], Lock],
    failures: list[str],
) -> Iterator[str]:
    held = ""
    try:
        lock = take_lock()
    except HeldError as error:
        held = str(error)
    else:
        try:
            if whose != takeover.PROXY:
                yield from _ours(open_dataplane, failures)
        finally:
            lock.release()
    if held and whose != takeover.PROXY:
        failures.append(f"{held}: stop it first, it would write everything again")
    if whose != SLUICE:
        yield from _theirs(failures, agent_runs=bool(held))


def _theirs(failures: list[str], *, agent_runs: bool) -> Iterator[str]:
    if running := takeover.who_runs(ports=not agent_runs):
        failures.append(f"{running}: stop it first, it would write everything again")
        return
    try:
        yield from takeover.remove_all()
    except DataplaneError as error:
        failures.append(str(error))


def _ours(open_dataplane: Callable[[str, Family], Dataplane], failures: list[str]) -> Iterator[str]:
    for name in modes.present():
        for family in Family:
            try:
                dataplane = open_dataplane(name, family)
                try:
                    found = dataplane.cleanup()
                finally:
                    dataplane.close()
            except UnavailableError as error:
                # A node that cannot run a mode holds nothing of it; who may not look cannot know.
                if os.geteuid() != 0:
                    failures.append(str(error))
            except DataplaneError as error:
                failures.append(str(error))
            else:
                if found:
                    yield f"removed what {name} held for {family.label}"
