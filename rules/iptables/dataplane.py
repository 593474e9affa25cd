"""The iptables dataplane: one family's rules in the tables nat and filter, by iptables-save and iptables-restore.

Every write is one iptables-restore, which changes each table in one transaction, filter before nat, and touches our
chains and our jumps alone.  A `sync` rests on what iptables-save printed; an `apply` on the model of what was written
last, and rewrites the chains that change.

iptables-legacy replaces a table as a whole in the kernel, whatever changes in it: there a change costs time that grows
with all Services, and the period between syncs is what batches changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from rules.dataplane import Applied, Capabilities, DataplaneError, Raw, RawItem, UnavailableError, repairs
from rules.forwarding import Delta, Family, ForwardingTable, Frontend, Route, apply_delta
from rules.iptables.decode import Reading, decode
from rules.iptables.layout import Options
from rules.iptables.model import Model
from rules.iptables.packets import Packets, packets
from rules.iptables.programs import (
    OPTIONAL,
    Backend,
    RestoreError,
    available,
    choose,
    missing_features,
    read_ours,
    remove,
)
from rules.iptables.restores import Restore, Tally, from_saved, owners, removal, restore
from rules.iptables.rulesets import changed_chains
from rules.iptables.text import TABLES, Saved
from rules.iptables.watch import OwnWrites, signature

_LIBERAL = Path("/proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal")


class IptablesDataplane:
    """The chains SLUICE-* of one family, in the network namespace of the threads that call."""

    name = "iptables"

    def __init__(self, family: Family, backend: Backend | None = None) -> None:
        """Of a family, by iptables-legacy or iptables-nft; None: the one in use on this node.

        Raises:
            UnavailableError: the node lacks the programs; the message says what to install.
        """
        self._family = family
        self._programs = choose(family, backend)
        self._missing: frozenset[str] | None = None
        """Features that the node lacks; None: not tried yet."""
        self._drop_invalid = not _conntrack_is_liberal()
        self._model: Model | None = None
        """What the kernel holds since the last write."""
        self._tally = Tally({table: {} for table in TABLES})
        self._failed = self._failed_partial = 0
        """Restores that were refused since the last `Applied`; those of them that wrote changes alone."""
        self._own_writes = OwnWrites(lambda: signature(family, self._programs.backend))

    @property
    def family(self) -> Family:
        return self._family

    @property
    def backend(self) -> Backend:
        """Which programs are used."""
        return self._programs.backend

    @property
    def capabilities(self) -> Capabilities:
        missing = self._missing or frozenset()
        return Capabilities(
            labels="comment" not in missing,
            affinity="recent" not in missing,
            loopback_node_ports=self._family is Family.IPV4,
            health_check_ports=True,
        )

    def check(self) -> None:
        """Try what rules need, in a chain that nothing leads to; see `rules.dataplane.Dataplane`."""
        try:
            missing = missing_features(self._programs)
        except UnavailableError:
            raise
        except DataplaneError as error:
            if why := self._programs.lacking(error):
                raise why from None
            return  # the first sync says what is wrong
        if needed := missing - OPTIONAL:
            raise UnavailableError(
                f"mode iptables needs {', '.join(sorted(needed))}, which this kernel or iptables-{self.backend} lacks"
            )
        self._missing = missing

    # --- reading -----------------------------------------------------------------------------------------------

    def read(self) -> ForwardingTable | None:
        """The table that the kernel holds; see `rules.dataplane.Dataplane`."""
        reading = decode(read_ours(self._programs), self._family)
        return reading.table if reading else None

    def raw(self) -> Raw | None:
        """The chains and rules themselves; see `rules.dataplane.Dataplane`."""
        saved = read_ours(self._programs)
        reading = decode(saved, self._family)
        return None if reading is None else Raw(reading.table, _raw_items(saved, reading))

    # --- writing -----------------------------------------------------------------------------------------------

    def sync(self, table: ForwardingTable) -> Applied:
        """Make the kernel hold `table`; see `rules.dataplane.Dataplane`."""
        with self._own_writes.writing():
            return self._sync(table)

    def _sync(self, table: ForwardingTable) -> Applied:
        self._model = None
        saved = read_ours(self._programs)
        reading = decode(saved, self._family)
        found = reading.table if reading else None
        options, notes = self._options()
        wanted = self._fit(table)
        refused: dict[Frontend, str] = {}
        failed = self._failed
        try:
            try:
                step = self._write(saved, wanted, options, notes)
            except RestoreError as error:
                if not error.ours:
                    raise
                step = self._write_without_culprits(error, found, wanted, options, refused)
        except DataplaneError:
            self._failed = failed  # the failure tells of those
            raise
        why = {table.routes[frontend].label or str(frontend): reason for frontend, reason in refused.items()}
        notes += repairs(found.damage if found else ())
        return self._applied(step, notes, full=True, found=found, refused=why)

    def _applied(
        self,
        step: Restore,
        notes: Iterable[str],
        *,
        full: bool = False,
        found: ForwardingTable | None = None,
        refused: Mapping[str, str] = {},
    ) -> Applied:
        failed, partial = self._failed, self._failed_partial
        self._failed = self._failed_partial = 0
        return Applied(
            operations=step.operations,
            bytes_sent=len(step.text) if step else 0,
            refused=frozenset(refused),
            why_refused=refused,
            full=full,
            notes=tuple(notes),
            found=found,
            rules=self._tally.rules(),
            rules_written=step.written,
            failed_restores=failed,
            failed_partial_restores=partial,
        )

    def apply(self, delta: Delta) -> Applied:
        """Apply `delta` to what was written last; see `rules.dataplane.Dataplane`."""
        model, self._model = self._model, None
        if model is None:
            raise DataplaneError("nothing is known of the kernel's rules: a sync must come first")
        delta = msgspec.structs.replace(delta, changed=self._fit_routes(delta.changed))
        if model.stands(delta.node):
            changes = model.plan(delta)
        else:
            before, model = model, Model(apply_delta(model.table(), delta), model.options)
            changes = changed_chains(before.chains(), model.chains())
        step = restore(changes)
        waited = ""
        if step:
            with self._own_writes.writing():
                try:
                    waited = self._programs.apply(step.text)
                except RestoreError:
                    self._failed += 1
                    self._failed_partial += 1
                    raise
        self._tally.change(changes)
        self._model = model
        return self._applied(step, [waited] if waited else [])

    def _write(
        self, saved: Saved, wanted: ForwardingTable, options: Options, notes: list[str] | None = None
    ) -> Restore:
        """Write what makes `saved` into `wanted`."""
        self._model = None
        model = Model(wanted, options)
        chains = model.chains()
        step = from_saved(saved, chains)
        if step:
            waited = self._attempt(step, model)
            if waited and notes is not None:
                notes.append(waited)
        self._model = model
        self._tally = Tally(chains)
        return step

    def _attempt(self, step: Restore, model: Model) -> str:
        try:
            return self._programs.apply(step.text)
        except RestoreError as error:
            self._failed += 1
            error.owners = owners(step, model, error.line)
            raise

    def _write_without_culprits(
        self,
        error: RestoreError,
        found: ForwardingTable | None,
        wanted: ForwardingTable,
        options: Options,
        refused: dict[Frontend, str],
    ) -> Restore:
        """Write what can be written, and put into `refused` what cannot, and why.

        Where the program named a line, its route is left out.  Else those that are new are tried in halves.
        """
        while error.owners:
            refused |= dict.fromkeys(error.owners, str(error))
            try:
                return self._write(read_ours(self._programs), _without(wanted, refused), options)
            except RestoreError as again:
                if not again.ours:
                    raise
                error = again
        held = found.routes if found is not None and not found.damage else {}
        doubtful = [
            frontend
            for frontend, route in wanted.routes.items()
            if held.get(frontend) != route and frontend not in refused
        ]
        left_out = {*refused, *doubtful}
        step = self._write(read_ours(self._programs), _without(wanted, left_out), options)
        pending = [doubtful]
        while pending:
            candidates = pending.pop()
            try:
                step = self._write(
                    read_ours(self._programs), _without(wanted, left_out.difference(candidates)), options
                )
            except RestoreError as again:
                if not again.ours:
                    raise
                half = len(candidates) // 2
                if half:
                    pending += [candidates[half:], candidates[:half]]
                else:
                    refused |= dict.fromkeys(candidates, str(again))
            else:
                left_out.difference_update(candidates)
        if self._model is None:  # the last attempt failed
            step = self._write(read_ours(self._programs), _without(wanted, left_out), options)
        return step

    def _options(self) -> tuple[Options, list[str]]:
        """What this node can do, and what it lacks, for the log.  Raises UnavailableError."""
        tried = self._missing is not None
        if not tried:
            self.check()
        missing = self._missing or frozenset()
        notes = []
        if missing and not tried:
            notes.append(f"iptables-{self.backend} on this node lacks {', '.join(sorted(missing))}")
        return Options(random_fully="random-fully" not in missing, drop_invalid=self._drop_invalid), notes

    def disturbed(self) -> bool:
        """Whether the rules are others than after the last write, or the last call; see `rules.iptables.watch`."""
        return self._own_writes.disturbed()

    def _fit(self, table: ForwardingTable) -> ForwardingTable:
        """The table as this node can store it."""
        return msgspec.structs.replace(table, routes=self._fit_routes(table.routes), damage=frozenset())

    def _fit_routes(self, routes: Mapping[Frontend, Route]) -> Mapping[Frontend, Route]:
        can = self.capabilities
        if (
            can.affinity
            and can.labels
            and not any(route.scheduler or route.proxy_protocol for route in routes.values())
        ):
            return routes
        return {
            frontend: msgspec.structs.replace(
                route,
                scheduler="",
                proxy_protocol=False,
                affinity=route.affinity if can.affinity else 0,
                label=route.label if can.labels else "",
            )
            for frontend, route in routes.items()
        }

    # --- the rest ----------------------------------------------------------------------------------------------

    def cleanup(self) -> bool:
        """Remove our chains and jumps; see `rules.dataplane.Dataplane`."""
        self._model = None
        # Where both kinds of programs are, an earlier run may have used the other one.
        return remove(available(self._family).values(), _removal)

    def packets(self) -> Packets:
        """What the rules have counted since they were written.

        Raises:
            DataplaneError: it could not be read.
        """
        return packets(self._programs)

    def remove_other(self) -> bool:
        """Remove what the other kind of programs holds of ours, from before a change of kinds; whether there was any.

        Raises:
            DataplaneError: it could not be removed.
        """
        others = (each for each in available(self._family).values() if each.backend != self.backend)
        return remove(others, _removal)

    def close(self) -> None:
        """End what watches; the rules stay."""
        self._own_writes.close()


def _removal(saved: Saved) -> str:
    return removal(saved).text


def _without(table: ForwardingTable, frontends: Iterable[Frontend]) -> ForwardingTable:
    out = frozenset(frontends)
    return msgspec.structs.replace(
        table, routes={frontend: route for frontend, route in table.routes.items() if frontend not in out}
    )


def _raw_items(saved: Saved, reading: Reading) -> list[RawItem]:
    model = Model(reading.table, reading.options)
    served = model.served()
    items = [RawItem(0, f"{each.table} {each.chain}: {each.rule.text}") for each in saved.jumps]
    for table in TABLES:
        items.append(RawItem(0, f"table {table}"))
        for name, rules in sorted(saved.chains[table].items()):
            items.append(RawItem(1, f"chain {name}", served.get((table, name, ""), ())))
            for rule in rules:
                comment = f'  "{rule.comment}"' if rule.comment else ""
                frontends = served.get((table, name, rule.text)) or served.get((table, name, ""), ())
                items.append(RawItem(2, rule.text + comment, frontends))
    return items


def _conntrack_is_liberal() -> bool:
    """Whether conntrack takes TCP packets out of their window as they are (IPT-15)."""
    try:
        return _LIBERAL.read_text().strip() != "0"
    except OSError:
        return False
