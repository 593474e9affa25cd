"""One transaction, and what a sync learns when the kernel refuses it: what the next try does otherwise."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from rules.dataplane import Applied, repairs
from rules.forwarding import Endpoint, Family, ForwardingTable, NodeFacts
from rules.netlink.errors import LostAnswerError, StaleGenerationError, TransactionError
from rules.nftables import names
from rules.nftables.elements import unpack_hairpin
from rules.nftables.model import Model
from rules.nftables.needs import Needs
from rules.nftables.refusals import Culprits, Step, contradicts_reading, culprits_of, is_of_the_node, refusal, unnamed
from rules.nftables.state import StaticState

_PATIENCE = 3
"""Transactions that are refused because anybody changed nftables, before one insists."""


class Written(NamedTuple):
    """What the kernel holds since the last write."""

    model: Model
    static: StaticState
    facts: NodeFacts
    present: Needs


class Plan(NamedTuple):
    """A transaction."""

    steps: list[Step]
    operations: int
    """How many objects and elements it adds or deletes."""
    written: Written
    """What the kernel holds after it."""
    complete: bool = False
    """Whether it makes the whole static part."""
    found: ForwardingTable | None = None
    """What was read before."""

    def applied(self, **others: Any) -> Applied:
        return Applied(operations=self.operations, bytes_sent=sum(len(step.message) for step in self.steps), **others)


class Attempts:
    """The tries of one sync.

    Each refusal changes what the next try does, or is raised.  So the tries come to an end, whatever the kernel says:
    a reading is distrusted once, the table made anew once, and a Service left out never comes back.
    """

    def __init__(self, wanted: ForwardingTable) -> None:
        self.wanted = wanted
        """The table, without what the kernel refused."""
        self.apart: set[str] = set()
        """Sets whose elements go in messages of their own: of one message, only the first bad element is named."""
        self.anew = False
        """Whether the table is to be made anew, whatever is there."""
        self._refused: dict[str, str] = {}
        self._found: ForwardingTable | None = None
        self._lost: Plan | None = None
        self._stale = 0
        self._distrusted = False

    def generation(self, read: int) -> int | None:
        """The generation that the transaction rests on; None: on any.

        Who always comes last would never write.  Insisting, what others did to our table since the reading either
        makes the transaction fail, or is told by the monitor and found by the next reading.
        """
        return read if self._stale < _PATIENCE else None

    def planned(self, plan: Plan) -> None:
        """This is tried now."""
        if not self.anew and self._lost is None:
            self._found = plan.found

    def learn(self, error: TransactionError, plan: Plan) -> None:
        """Take note of why it failed.

        Raises:
            DataplaneError: another try would fare no better.
        """
        if isinstance(error, StaleGenerationError):
            self._stale += 1
            return
        if isinstance(error, LostAnswerError):
            known = [failure for failure in error.errors if failure.message >= 0]
            if not known:
                self._lost = plan  # applied or not: the next reading tells
                return
            error = TransactionError(known)  # one refusal is enough to know that nothing was applied
        family = self.wanted.family
        if is_of_the_node(error.errors):
            raise refusal(error, plan.steps, family) from error
        if not self._distrusted and contradicts_reading(error.errors):
            self._distrusted = True
            return
        culprits = culprits_of(error.errors, plan.steps, plan.written.model)
        unnamed_sets = unnamed(error.errors, plan.steps) - self.apart
        if culprits:
            self._leave_out(culprits)
        elif unnamed_sets:
            self.apart |= unnamed_sets
        elif plan.complete:
            raise refusal(error, plan.steps, family, complete=True) from error
        else:
            self.anew = True  # what is there is in the way

    def _leave_out(self, culprits: Culprits) -> None:
        for frontend, why in culprits.frontends.items():
            self._refused[self.wanted.routes[frontend].label] = why
        self.apart |= {name for name, _ in culprits.keys}
        self.wanted = msgspec.structs.replace(
            self.wanted,
            routes={key: route for key, route in self.wanted.routes.items() if key not in culprits.frontends},
            hairpins=self.wanted.hairpins - _hairpins(culprits, self.wanted.family),
        )

    def applied(self, plan: Plan, notes: list[str]) -> Applied:
        """What the sync did, whose last transaction this is."""
        done = self._lost if self._lost is not None and not plan.steps else plan
        damage = self._found.damage if self._found is not None else ()
        return done.applied(
            refused=frozenset(self._refused),
            why_refused=self._refused,
            full=True,
            found=self._found,
            notes=(*notes, *repairs(damage)),
        )

    def exhausted(self) -> str:
        """Why there is no end to the tries, in words."""
        return "the kernel's answers are lost" if self._lost is not None else "it changes"


def _hairpins(culprits: Culprits, family: Family) -> frozenset[Endpoint]:
    return frozenset(unpack_hairpin(key, family) for name, key in culprits.keys if name == names.LOCAL_ENDPOINT_PAIRS)
