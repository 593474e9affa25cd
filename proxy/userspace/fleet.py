"""One family's share of all workers: asked together, written to one after the other."""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import msgspec

from proxy.userspace.anyip import read_routes
from proxy.userspace.control import (
    Answer,
    Applied,
    Apply,
    Connection,
    ControlError,
    Failed,
    Request,
    Stats,
    StatsAnswer,
    Table,
    TableAnswer,
    WireNode,
    frame,
)
from proxy.userspace.decode import Kernel, Worker
from proxy.userspace.sockdiag import inodes_of, read_listeners
from proxy.userspace.supervisor import Changed, Workers
from rules.forwarding import Delta, Family, ForwardingTable, Frontend, Route, difference

CHUNK = 500
"""Frontends in one message: a worker serves its flows between two."""

_Kind = TypeVar("_Kind", bound=Answer)


class Sent(NamedTuple):
    """What telling a worker came to."""

    trouble: Mapping[Frontend, str] = {}
    """All frontends of the family that it has trouble with, and why."""
    operations: int = 0
    size: int = 0
    """In bytes."""


class Fleet:
    """All workers, for one family.  Not for two threads at once.

    Its methods raise ControlError where a worker that was there ends, or answers nonsense.
    """

    def __init__(self, family: Family, workers: Workers) -> None:
        self._family = family
        self._workers = workers
        self._serials = itertools.count(1)
        self._trouble: dict[int, frozenset[Frontend]] = {}
        self._fed: dict[int, Connection] = {}
        """Those that hold what all should."""

    @property
    def count(self) -> int:
        """How many there are to be."""
        return self._workers.count

    def connect(self) -> Changed:
        """Find those that run."""
        return self._workers.connect()

    def ensure(self) -> Changed:
        """Have as many as there are to be.  Raises DataplaneError."""
        return self._workers.ensure()

    def retire(self, changed: Changed) -> None:
        """Let go of workers that others have replaced."""
        for stranger in changed.outdated:
            self._workers.retire(stranger)

    def doubt(self) -> None:
        """Take nothing for known of what they hold."""
        self._fed.clear()
        self._trouble.clear()

    @property
    def whole(self) -> bool:
        """Whether all that there are to be hold what was written last."""
        return len(self._fed) == self.count and self._fed == self._workers.connections

    def look(self) -> tuple[list[Worker], Kernel]:
        """What the workers say, and what the kernel knows.

        Raises:
            OSError: the kernel cannot be asked.
            DecodeError: what it says makes no sense.
        """
        workers = [self._ask_worker(index) for index in sorted(self._workers.connections)]
        return [each for each in workers if each], Kernel(read_listeners(self._family), read_routes(self._family))

    def _ask_worker(self, index: int) -> Worker | None:
        connection = self._workers.connections[index]
        try:
            answer = _expect(connection, Table(self._family), TableAnswer)
        except ControlError:
            self.drop(index)  # it ended while it was asked
            return None
        return Worker(index, connection.welcome.pid, answer, inodes_of(connection.welcome.pid))

    def statistics(self) -> list[tuple[int, StatsAnswer]]:
        """What workers have counted, of all families, by process."""
        found = []
        for index, connection in sorted(self._workers.connections.items()):
            try:
                found.append((connection.welcome.pid, _expect(connection, Stats(), StatsAnswer)))
            except ControlError:
                self.drop(index)
        return found

    def flows(self) -> int:
        """How many connections and UDP flows of the family are open."""
        return sum(
            each.open for _, answer in self.statistics() for each in answer.frontends if each.family is self._family
        )

    # --- writing -----------------------------------------------------------------------------------------------

    def bring(self, worker: Worker, wanted: ForwardingTable, wire: WireNode, absent: Collection[Frontend]) -> Sent:
        """Send a worker what it lacks: nothing, where it has all.

        `absent` are frontends whose listeners are gone behind its back: they come back when the frontend does.
        """
        answer = worker.answer
        held = ForwardingTable(
            family=wanted.family, node=wanted.node, routes=dict(answer.routes), hairpins=frozenset(answer.hairpins)
        )
        delta = difference(held, wanted)
        anew = {each: wanted.routes[each] for each in absent if each in wanted.routes}
        delta = msgspec.structs.replace(delta, changed={**delta.changed, **anew}, removed=delta.removed.union(anew))
        node = wire if answer.node != wire or not worker.serves else None
        connection = self._workers.connections[worker.number]
        sent = Sent(trouble=dict(answer.trouble))
        if delta or node is not None:
            sent = self._send(connection, delta, node)
        self._fed[worker.number] = connection
        self._trouble[worker.number] = frozenset(sent.trouble)
        return sent

    def feed(self, wanted: ForwardingTable, wire: WireNode) -> None:
        """Bring all that is wanted to those workers that have not got it yet."""
        for index, connection in list(self._workers.connections.items()):
            if self._fed.get(index) is not connection:
                worker = self._ask_worker(index)
                if worker is not None:
                    self.bring(worker, wanted, wire, ())

    def tell(self, delta: Delta, node: WireNode | None) -> tuple[Sent, Mapping[Frontend, str]]:
        """Send a delta to all; and the frontends of which the trouble has changed since they were told last."""
        operations = size = 0
        news: dict[Frontend, str] = {}
        for index, connection in self._workers.connections.items():
            sent = self._send(connection, delta, node)
            operations += sent.operations
            size += sent.size
            for frontend in sent.trouble.keys() ^ self._trouble.get(index, frozenset()):
                if frontend in sent.trouble or frontend not in delta.removed:
                    news[frontend] = sent.trouble.get(frontend, "it is served again")
            self._trouble[index] = frozenset(sent.trouble)
        return Sent({}, operations, size), news

    def _send(self, connection: Connection, delta: Delta, node: WireNode | None) -> Sent:
        """Have a worker apply a delta, a part after the other."""
        told, size = Applied(), 0
        for request in self._parts(delta, node):
            size += len(frame(request))
            told = _expect(connection, request, Applied)
        return Sent(dict(told.trouble), len(delta.changed) + len(delta.removed) + (node is not None), size)

    def _parts(self, delta: Delta, node: WireNode | None) -> Iterator[Apply]:
        serial = f"{os.getpid()}-{next(self._serials)}"
        if node is not None or delta.removed or delta.hairpins_added or delta.hairpins_removed:
            yield Apply(
                family=self._family,
                serial=serial,
                node=node,
                removed=sorted(delta.removed),
                hairpins_added=sorted(delta.hairpins_added),
                hairpins_removed=sorted(delta.hairpins_removed),
            )
        items: Iterator[tuple[Frontend, Route]] = iter(delta.changed.items())
        while part := list(itertools.islice(items, CHUNK)):
            yield Apply(family=self._family, serial=serial, put=part)

    # --- ending ------------------------------------------------------------------------------------------------

    def give_up(self) -> bool:
        """Have all workers close the family's listeners; whether any was told to serve it."""
        self.doubt()
        served = False
        for index, connection in list(self._workers.connections.items()):
            try:
                if _expect(connection, Table(self._family), TableAnswer).serial:
                    served = True
                    _expect(connection, Apply(family=self._family, reset=True, node=WireNode()), Applied)
            except ControlError:
                self.drop(index)
        return served

    def serves(self, families: Sequence[Family]) -> bool:
        """Whether any worker was told to serve one of the families."""
        for index, connection in list(self._workers.connections.items()):
            try:
                if any(_expect(connection, Table(each), TableAnswer).serial for each in families):
                    return True
            except ControlError:
                self.drop(index)
        return False

    def stop(self) -> None:
        """End all workers.  Raises DataplaneError."""
        self.doubt()
        self._workers.stop()

    def drop(self, index: int) -> None:
        """Forget a worker that is gone."""
        self._workers.drop(index)
        self._fed.pop(index, None)

    def pids(self) -> dict[int, int]:
        """The workers' processes by index."""
        return {index: each.welcome.pid for index, each in self._workers.connections.items()}

    def close(self) -> None:
        """End the connections; the workers stay."""
        self._fed.clear()
        self._workers.close()


def _expect(connection: Connection, request: Request, kind: type[_Kind]) -> _Kind:
    """The answer to a request, of the kind that it must be.  Raises ControlError."""
    answer = connection.ask(request)
    if not isinstance(answer, kind):
        what = answer.why if isinstance(answer, Failed) else f"it answered {type(answer).__name__}"
        raise ControlError(f"worker {connection.index}: {what}")
    return answer
