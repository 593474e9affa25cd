"""From userspace mode to one of rules and back, without a new connection that is lost for it.

Theory of operation
-------------------
Rules decide about the first packet of a connection, and translate the others by what connection tracking remembers of
it.  Workers are the end of their connections, and where there are no rules, nothing is tracked.  So at either change
there is an instant in which a connection that was just begun would be cut:

*To rules.*  Tracking begins with the first rule.  What a worker has accepted a moment before would be seen in its
middle, pass for new, and be given a backend that has never heard of it, and resets it.  So an empty table comes first
(`meet`): with it connections are tracked, and nothing is translated.  What is said through workers for ACQUAINTANCE
seconds is known to be theirs; only then come the frontends.

*From rules.*  Rules that go leave what they translated without translation, and the node resets it.  So an empty table
takes their place first (`release`): new connections reach the listeners, which are there already, and those under
way are translated for as long as workers may drain.

Connections that say nothing for as long as this takes are cut all the same.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable

from proxy.logs import get_logger
from proxy.userspace.supervisor import anything_left
from rules.dataplane import Dataplane, DataplaneError
from rules.forwarding import ForwardingTable

_log = get_logger("sluice.userspace")

ACQUAINTANCE = 1.0
"""Seconds in which tracking meets what workers carry."""
LAST_ANSWERS = 0.3
"""Seconds in which a backend may answer the last datagram that a worker has passed on."""


def meet(dataplanes: Iterable[Dataplane]) -> None:
    """Before the first sync of a mode of rules: have what workers carry tracked, if there are any.

    Raises:
        DataplaneError: the rules by which it is tracked could not be written.
    """
    if not anything_left():
        return
    new = [each for each in dataplanes if each.name != "userspace" and each.read() is None]
    for each in new:
        each.sync(ForwardingTable(family=each.family))
    if new:
        _log.info("connections of userspace mode are tracked before rules come", seconds=ACQUAINTANCE)
        time.sleep(ACQUAINTANCE)


def release(old: Dataplane, drain: float) -> float:
    """Have an old mode's part take no new connection, as far as another's is there; in how many seconds it may go.

    `drain` is for how long connections may go on that rules have translated.
    """
    if old.name == "userspace":
        return LAST_ANSWERS
    with contextlib.suppress(DataplaneError):  # what cannot be emptied can still be removed
        if old.read() is not None:
            old.sync(ForwardingTable(family=old.family))
            _log.info("rules take no new connection", mode=old.name, family=old.family.label, drain=drain)
            return drain
    return 0.0
