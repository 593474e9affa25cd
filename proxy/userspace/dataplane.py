"""The userspace dataplane: one family's table in the worker processes, and the routes that bring them its packets.

Theory of operation
-------------------
A frontend is served when its listeners wait and its address is local, in that order: an address that became local
first would refuse its clients for a moment, where before they had been left alone, or had reached what another mode
had put there.  On the way back the listeners go first, and the address when the last flow has left it: a flow of a
Service that is gone goes on, as it does in other modes, and needs its address.  Such lingering addresses are looked at
again every few seconds, and no table counts them.

What workers hold outlives the agent, so a `sync` asks them, and asks the kernel whether their listeners and the routes
are there; an `apply` sends a delta to each of them.  A port that somebody else holds is the worker's trouble, which it
tells with every answer and tries to mend by itself.

`attend` and `disturbed` are for whoever watches (`proxy.userspace.watch`), in a thread of its own.
"""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Sequence

import msgspec

from proxy.config.settings import UserspaceLimits
from proxy.userspace.anyip import LocalRoutes, RouteError, change_routes, prefer_source, read_routes
from proxy.userspace.choose import LEAST_CONNECTIONS, ROUND_ROBIN
from proxy.userspace.control import ControlError, WireNode
from proxy.userspace.decode import Kernel, Worker, decode, missing, own_addresses, raw_items, wire_node
from proxy.userspace.fleet import Fleet, Sent
from proxy.userspace.known import Known, unreachable
from proxy.userspace.sockdiag import addresses_in_use
from proxy.userspace.supervisor import Changed, Workers
from proxy.userspace.totals import Totals
from rules.dataplane import Applied, Capabilities, DataplaneError, Raw
from rules.diff import fit
from rules.forwarding import Address, Delta, Family, ForwardingTable, NodeFacts, Prefix
from rules.netlink.attributes import DecodeError
from rules.node_ports import is_loopback

CAPABILITIES = {
    family: Capabilities(
        loopback_node_ports=family is Family.IPV4,
        health_check_ports=False,
        source_address=False,
        sctp=False,
        schedulers=frozenset({ROUND_ROBIN, LEAST_CONNECTIONS}),
        proxy_protocol=True,
    )
    for family in Family
}
_POLL = 0.05
_NOTES = 10


class UserspaceDataplane:
    """One family's part of the workers of the network namespace of the threads that call."""

    name = "userspace"

    def __init__(self, family: Family, limits: UserspaceLimits = UserspaceLimits()) -> None:  # noqa: B008  # frozen
        """Of a family; workers that run already keep the limits that they were started with."""
        self._family = family
        self._fleet = Fleet(family, Workers(limits.workers, worker_options(limits)))
        self.drain = limits.drain
        """Seconds that flows may go on once it is told to end."""
        self.totals = Totals(family)
        """What has passed the workers, as it was counted last."""
        self._lock = threading.Lock()
        """Held by every method that talks to workers or kernel."""
        self._known: Known | None = None
        self._lingering: frozenset[Prefix] = frozenset()
        self._powerless = False
        """Whether it was told that addresses cannot be made local."""

    @property
    def family(self) -> Family:
        return self._family

    @property
    def capabilities(self) -> Capabilities:
        return CAPABILITIES[self._family]

    def check(self) -> None:
        """Nothing is lacking that would not be lacking for every program: sockets are all that it takes."""

    # --- reading -----------------------------------------------------------------------------------------------

    def read(self) -> ForwardingTable | None:
        """The table that clients meet; see `rules.dataplane.Dataplane`."""
        with self._talking():
            self._fleet.connect()
            return self._decode(*self._fleet.look())

    def raw(self) -> Raw | None:
        """Processes, sockets and routes; see `rules.dataplane.Dataplane`."""
        with self._talking():
            self._fleet.connect()
            workers, kernel = self._fleet.look()
            table = self._decode(workers, kernel)
            return None if table is None else Raw(table, list(raw_items(workers, kernel, table)))

    def _decode(self, workers: Sequence[Worker], kernel: Kernel) -> ForwardingTable | None:
        return decode(self._family, workers, kernel, self._addresses_of_flows(workers, kernel))

    def _addresses_of_flows(self, workers: Sequence[Worker], kernel: Kernel) -> frozenset[Address]:
        """The addresses that open flows use; none where all single routes have a frontend, as then nobody asks."""
        had = {frontend.address for worker in workers for frontend, _ in worker.answer.routes}
        if all(prefix.address in had for prefix in kernel.routes.ours if prefix.length == len(prefix.address) * 8):
            return frozenset()
        return addresses_in_use(self._family)

    @contextlib.contextmanager
    def _talking(self) -> Iterator[None]:
        """Be the only one who talks to workers and kernel; whatever goes wrong is a DataplaneError."""
        with self._lock:
            try:
                yield
            except (ControlError, DecodeError, OSError) as error:
                raise DataplaneError(f"userspace ({self._family.label}): {error}") from error

    # --- writing -----------------------------------------------------------------------------------------------

    def sync(self, table: ForwardingTable) -> Applied:
        """Have workers and routes serve `table`; see `rules.dataplane.Dataplane`."""
        with self._talking():
            self._known = None
            self._fleet.doubt()
            changed = self._fleet.ensure()
            workers, kernel = self._fleet.look()
            found = self._decode(workers, kernel)
            wanted = fit(msgspec.structs.replace(table, damage=frozenset()), self.capabilities)
            wire = self._wire(wanted.node, kernel.routes)
            absent = missing(workers, kernel)
            sent = [self._fleet.bring(each, wanted, wire, absent[each.number]) for each in workers]
            self._fleet.retire(changed)
            known = Known(wanted, wire, kernel.routes)
            takes = known.needed()
            self._lingering = kernel.routes.ours - takes
            refused, count = self._route(known, takes - kernel.routes.ours)
            self._known = known
            trouble = {key: why for each in sent for key, why in each.trouble.items()}
            trouble |= unreachable(wanted, refused, known.local)
            why: dict[str, str] = {}
            for frontend in sorted(trouble):
                label = wanted.routes[frontend].label if frontend in wanted.routes else ""
                why.setdefault(label or str(frontend), trouble[frontend])
            return Applied(
                operations=count + sum(each.operations for each in sent),
                bytes_sent=sum(each.size for each in sent),
                refused=frozenset(why),
                why_refused=why,
                full=True,
                notes=(*_notes(changed, found), *self._complaints(refused)),
                found=found,
            )

    def apply(self, delta: Delta) -> Applied:
        """Apply `delta` to what was written last; see `rules.dataplane.Dataplane`."""
        with self._talking():
            known, self._known = self._known, None
            if known is None or not self._fleet.whole:
                raise DataplaneError("it is not known what all workers hold: a sync must come first")
            delta = known.fitted(delta, self.capabilities)
            node = None
            if delta.node is not None:
                wire = self._wire(delta.node, known.local)
                node = wire if wire != known.wire else None
                known.wire = wire
            sent, news = self._fleet.tell(delta, node) if delta else (Sent(), {})
            add, remove = known.take(delta)
            self._lingering = frozenset(each for each in self._lingering | remove if not known.uses(each))
            refused, count = self._route(known, add)
            for error in refused:
                raise DataplaneError(f"the route {error.prefix}: {error.strerror}")
            for frontend, why in news.items():
                raise DataplaneError(f"{frontend}: {why}")  # whose trouble it is, a sync tells
            self._known = known
            return Applied(operations=sent.operations + count, bytes_sent=sent.size)

    def _wire(self, facts: NodeFacts, local: LocalRoutes) -> WireNode:
        return wire_node(facts, self._family, own_addresses(local), self._fleet.count, self.drain)

    def _route(self, known: Known, add: Collection[Prefix]) -> tuple[list[RouteError], int]:
        """Add routes, and remove those that linger and that no flow needs; what was refused, and how many changed."""
        gone = self._lingering - self._used(self._lingering) if self._lingering else frozenset()
        if not add and not gone:
            return [], 0
        refused = change_routes(self._family, add, gone)
        self._lingering -= gone
        known.local = read_routes(self._family) if refused else known.local.changed(add, gone)
        return refused, len(add) + len(gone) - len(refused)

    def _complaints(self, refused: Iterable[RouteError]) -> Iterator[str]:
        """What is to be said once about routes that cannot be made."""
        powerless = any(each.errno in (errno.EPERM, errno.EACCES) for each in refused)
        if powerless and not self._powerless:
            yield (
                "without CAP_NET_ADMIN no address can be made one of the node's: node ports work, and so do Services "
                "at addresses that the node has; other ClusterIPs, external IPs and load balancer addresses do not"
            )
        self._powerless = powerless

    # --- watching ----------------------------------------------------------------------------------------------

    def attend(self) -> Changed:
        """Replace workers that are gone, and give the new ones what the others have; what became of them.

        Before the first sync, and after a failure, it does nothing: the next sync does all of it.

        Raises:
            DataplaneError: a worker cannot be started, or ended at once.
        """
        with self._talking():
            known = self._known
            if known is None:
                return Changed()
            changed = self._fleet.ensure()
            self._fleet.feed(known.table(), known.wire)
            self._fleet.retire(changed)
            return changed

    def tidy(self) -> None:
        """Take away addresses that the last flow has left.  Raises DataplaneError."""
        with self._talking():
            if self._known is not None:
                self._route(self._known, ())

    def count(self) -> None:
        """Take what workers have counted into `totals`.  Raises DataplaneError."""
        with self._talking():
            self.totals.take(self._fleet.statistics())

    def deaf(self) -> bool:
        """Whether a listener is gone behind its worker's back; False while something is being written."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            return self._known is not None and any(missing(*self._fleet.look()).values())
        except (OSError, DecodeError):  # ControlError is an OSError
            return False
        finally:
            self._lock.release()

    def disturbed(self) -> bool:
        """Whether routes or the node's addresses are others than after the last write; False while one is at work."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            known = self._known
            if known is None:
                return False
            now = read_routes(self._family)
            before, known.local = known.local, now
        except (OSError, DecodeError):
            return False
        else:
            return now != before
        finally:
            self._lock.release()

    def worker_pids(self) -> dict[int, int]:
        """The processes of the workers by index, as far as this dataplane is connected with them."""
        with self._lock:
            return self._fleet.pids()

    # --- the rest ----------------------------------------------------------------------------------------------

    def cleanup(self) -> bool:
        """Serve the family no longer, and end the workers if they serve no other; see `rules.dataplane.Dataplane`.

        New clients are refused at once; flows may go on for the drain that was configured where the workers run.
        """
        with self._talking():
            self._known = None
            self._lingering = frozenset()
            changed = self._fleet.connect()
            workers = bool(self._fleet.pids() or changed.outdated)
            serving, (_, local) = self._fleet.look()
            self._step_back(local)
            served = self._fleet.give_up()
            if served or local.ours:
                self._await_flows(local, max((each.answer.node.drain for each in serving if each.serves), default=0.0))
            for refusal in change_routes(self._family, (), local.ours):
                raise DataplaneError(f"the route {refusal.prefix} stays: {refusal.strerror}")
            if workers and not self._fleet.serves([each for each in Family if each is not self._family]):
                self._fleet.stop()
                return True
            return served or bool(local.ours)

    def _step_back(self, local: LocalRoutes) -> None:
        """Have the node's own connections, which others may carry by now, no longer begin at addresses that will go."""
        own = [each for each in sorted(own_addresses(local)) if not is_loopback(each)]
        if own and self._family is Family.IPV4:
            prefer_source(self._family, local.ours, own[0])

    def _await_flows(self, local: LocalRoutes, drain: float) -> None:
        """Return when nothing uses the addresses any more, or the time of the drain is over."""
        deadline = time.monotonic() + drain
        while time.monotonic() < deadline and (self._fleet.flows() or self._used(local.ours)):
            time.sleep(_POLL)

    def _used(self, routes: Iterable[Prefix]) -> frozenset[Prefix]:
        """Those of the routes whose addresses open TCP connections have."""
        used = addresses_in_use(self._family)
        return frozenset(each for each in routes if any(address in each for address in used))

    def close(self) -> None:
        """End the connections; workers and routes stay."""
        with self._lock:
            self._fleet.close()


def worker_options(limits: UserspaceLimits) -> tuple[str, ...]:
    """The arguments of a worker with these limits, beside its index."""
    return (
        f"--connect-timeout={limits.connect_timeout}",
        f"--tcp-idle={limits.tcp_idle_timeout}",
        f"--udp-idle={limits.udp_idle_timeout}",
        f"--udp-stream-idle={limits.udp_stream_timeout}",
        f"--max-udp-flows={limits.max_udp_flows}",
    )


def _notes(changed: Changed, found: ForwardingTable | None) -> list[str]:
    notes = [f"worker {each.index} is replaced: {each}" for each in changed.outdated]
    damage = sorted(found.damage) if found is not None else []
    notes += [f"repaired: {each}" for each in damage[:_NOTES]]
    if len(damage) > _NOTES:
        notes.append(f"repaired: {len(damage) - _NOTES} more")
    return notes
