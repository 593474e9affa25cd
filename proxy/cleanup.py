"""`sluice cleanup`: remove everything of ours from the kernel, and nothing else (CFG-52).

It needs no configuration: every dataplane that exists is asked, in both families.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from proxy import modes
from proxy.lock import HeldError, Lock
from rules.dataplane import Dataplane, DataplaneError
from rules.forwarding import Family


def main(
    *,
    open_dataplane: Callable[[str, Family], Dataplane] = modes.open_dataplane,
    take_lock: Callable[[], Lock] = Lock,
) -> int:
    """Remove and say what was removed; 0, or 2 if something could not be."""
    try:
        lock = take_lock()
    except HeldError as error:
        sys.stderr.write(f"sluice cleanup: {error}: stop it first, it would write everything again\n")
        return 2
    try:
        return _clean(open_dataplane)
    finally:
        lock.release()


def _clean(open_dataplane: Callable[[str, Family], Dataplane]) -> int:
    removed = False
    failures: dict[str, None] = {}
    for name in modes.present():
        for family in Family:
            try:
                dataplane = open_dataplane(name, family)
                try:
                    found = dataplane.cleanup()
                finally:
                    dataplane.close()
            except DataplaneError as error:
                failures[str(error)] = None
                continue
            if found:
                removed = True
                sys.stdout.write(f"removed what {name} held for {family.label}\n")
    for failure in failures:
        sys.stderr.write(f"sluice cleanup: {failure}\n")
    if failures:
        return 2
    if not removed:
        sys.stdout.write("nothing of sluice was there\n")
    return 0
