"""The worker processes: started, found again by the next agent, replaced, ended.

Theory of operation
-------------------
A worker belongs to nobody.  It has a session of its own and outlives the agent that started it; the next one finds it
by its control socket, of which the kernel keeps a list per network namespace.  So nothing about workers is written
down anywhere: those that run are those that hold a name.

Each worker serves the same table, and the kernel spreads new clients over their listeners.  Indexes tell workers apart
and mean nothing else.  One that speaks another version of the protocol, after an upgrade, is replaced without a gap: a
new one takes a free index and the whole table first, and only then the old one is told to accept no more and to end
with its last flow.

Starting is done by one at a time, which an abstract socket sees to, as both families' dataplanes may find workers
missing at the same moment.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from proxy.peers import is_ours, peer
from proxy.userspace.anyip import read_routes
from proxy.userspace.control import (
    Connection,
    ControlError,
    Done,
    Drain,
    Stop,
    control_name,
)
from rules.dataplane import DataplaneError
from rules.forwarding import Family
from rules.netlink.attributes import DecodeError

START = 30.0
"""Seconds in which a new worker must answer: Python's own start on a busy node takes most of one."""
GREETING = 10.0
"""Seconds in which one that runs must say its name; one that doesn't is stuck, and useless to its clients."""
OUTDATED_DRAIN = 86400.0
"""Seconds that flows of a worker of another version are left after an upgrade."""
_PROGRAM = "proxy.userspace.worker"
_POLL = 0.01
_STARTING = "\0sluice-workers/starting"


class StrangeWorkerError(ControlError):
    """A worker is there and cannot be used.

    `pid` is its process: 0 if it is in another process namespace, -1 if it is another user's and so no worker at all.
    """

    def __init__(self, index: int, pid: int, why: str, *, stuck: bool = False) -> None:
        super().__init__(why)
        self.index = index
        self.pid = pid
        self.stuck = stuck
        """Whether it gives no answer at all."""


class Changed(NamedTuple):
    """What became of the workers."""

    started: tuple[int, ...] = ()
    adopted: tuple[int, ...] = ()
    outdated: tuple[StrangeWorkerError, ...] = ()
    """Those to be drained once the new ones serve."""
    lost: tuple[int, ...] = ()
    """Those that were known and are gone."""


def default_count() -> int:
    """One worker for each processor that this process may use."""
    return len(os.sched_getaffinity(0))


def running() -> list[int]:
    """The indexes of the workers of this network namespace, by the names of their control sockets."""
    prefix = "@" + control_name(0)[1:-1]
    found = set()
    # Of this thread: a process may have threads in several network namespaces.  Names of others' sockets are any bytes.
    for line in Path("/proc/thread-self/net/unix").read_text(errors="replace").splitlines():
        _, at, index = line.rpartition(" ")[2].partition(prefix)
        if at and index.isdecimal():
            found.add(int(index))
    return sorted(found)


def anything_left() -> bool:
    """Whether workers run in this network namespace, or routes of theirs are there."""
    with contextlib.suppress(OSError, DecodeError):
        return bool(running()) or any(read_routes(family).ours for family in Family)
    return False


def spawn(index: int, count: int, options: Sequence[str] = ()) -> int:
    """Start a worker of an index, one of `count`, and return its process id; `options` are more of its arguments.

    It gets a session of its own, so that no signal of a terminal reaches it, an empty standard input, and what is left
    of the agent's standard error for its log.
    """
    return os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", _PROGRAM, "--index", str(index), "--workers", str(count), *options],
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, 2, 1),
        ],
        setsid=True,
        setsigmask=(),
        setsigdef=(signal.SIGPIPE, signal.SIGINT),
    )


class Workers:
    """The workers, as one family's dataplane is connected with them.  Not for two threads at once."""

    def __init__(self, count: int = 0, options: Sequence[str] = ()) -> None:
        """Of `count` workers (0: one per processor), which are started with `options` as further arguments."""
        self.count = count or default_count()
        self.connections: dict[int, Connection] = {}
        self._options = tuple(options)
        self._children: set[int] = set()

    def connect(self) -> Changed:
        """Be connected with those that run, and start none."""
        lost = [index for index, each in self.connections.items() if not _is_alive(each)]
        for index in lost:
            self.drop(index)
        self._reap()
        adopted, outdated = [], []
        for index in running():
            if index not in self.connections:
                try:
                    connection = _connect(index)
                except StrangeWorkerError as error:
                    outdated.append(error)
                except ControlError:
                    continue  # it just ended
                else:
                    self.connections[index] = connection
                    adopted.append(index)
        return Changed(adopted=tuple(adopted), outdated=tuple(outdated), lost=tuple(lost))

    def ensure(self) -> Changed:
        """Have as many workers as there should be; those too many are among `outdated`.

        Raises:
            DataplaneError: one cannot be started.
        """
        with _alone():
            changed = self.connect()
            for each in changed.outdated:
                if each.stuck and each.pid > 0:
                    # Nobody is served by it, and the kernel goes on handing clients to it.
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(each.pid, signal.SIGKILL)
            outdated = list(changed.outdated)
            for index in sorted(self.connections)[self.count :]:
                outdated.append(StrangeWorkerError(index, self.connections[index].welcome.pid, "there are too many"))
                self.drop(index)
            started = []
            taken = {*self.connections, *(each.index for each in outdated)}
            while len(self.connections) < self.count:
                index = next(each for each in range(len(taken) + 1) if each not in taken)
                taken.add(index)
                self.connections[index] = self._begin(index)
                started.append(index)
        return changed._replace(started=tuple(started), outdated=tuple(outdated))

    def drop(self, index: int) -> None:
        """Forget a worker that gave no answer."""
        self.connections.pop(index).close()

    def retire(self, stranger: StrangeWorkerError, seconds: float = OUTDATED_DRAIN) -> None:
        """Have a worker that `ensure` found unfit accept no more, and end with its flows."""
        if stranger.stuck:
            return  # it has been ended
        try:
            with contextlib.closing(Connection(stranger.index, timeout=GREETING, greet=False)) as old:
                answer = old.ask(Drain(seconds))
        except ControlError:
            return  # it has gone, or was ended
        if not isinstance(answer, Done) and stranger.pid > 0:
            # It doesn't know what draining is: a signal means the same to all of them.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(stranger.pid, signal.SIGTERM)

    def stop(self) -> None:
        """End all workers at once, and wait until they are gone; those of other versions too.

        Raises:
            DataplaneError: one does not go.
        """
        strangers = [each for each in self.connect().outdated if each.pid >= 0]
        ending = {*self.connections, *(each.index for each in strangers)}
        for index, connection in list(self.connections.items()):
            with contextlib.suppress(ControlError):
                connection.ask(Stop())
            self.drop(index)
        for each in strangers:
            if each.pid > 0:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(each.pid, signal.SIGKILL)
        deadline = time.monotonic() + START
        while left := ending.intersection(running()):
            if time.monotonic() > deadline:
                raise DataplaneError(f"userspace: worker {min(left)} does not end")
            time.sleep(_POLL)
        self._reap()

    def close(self) -> None:
        """End the connections; the workers stay."""
        for index in list(self.connections):
            self.drop(index)
        self._reap()

    def _begin(self, index: int) -> Connection:
        try:
            pid = spawn(index, self.count, self._options)
        except OSError as error:
            raise DataplaneError(f"userspace: worker {index} cannot be started: {error}") from error
        self._children.add(pid)
        deadline = time.monotonic() + START
        while True:
            with contextlib.suppress(ControlError):
                return Connection(index, timeout=START)
            if not self._lives(pid):
                raise DataplaneError(f"userspace: worker {index} ended at once: its last line is in the log")
            if time.monotonic() > deadline:
                raise DataplaneError(f"userspace: worker {index} does not answer {START:.0f} s after its start")
            time.sleep(_POLL)

    def _lives(self, pid: int) -> bool:
        self._reap()
        return pid in self._children

    def _reap(self) -> None:
        """Take note of children that have ended, so that none is left as a zombie."""
        for pid in list(self._children):
            try:
                ended, _ = os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                ended = pid
            if ended:
                self._children.discard(pid)


def _connect(index: int) -> Connection:
    """A connection with a worker that runs.

    Raises:
        StrangeWorkerError: it is stuck, or of another version or user.
        ControlError: it is gone.
    """
    try:
        return Connection(index, timeout=GREETING)
    except ControlError as error:
        pid = _pid_of(index)
        if pid is None:
            raise
        # One that refuses us says so; of one that is silent, an error of the socket tells.
        raise StrangeWorkerError(index, pid, str(error), stuck=isinstance(error.__cause__, OSError)) from error


def _pid_of(index: int) -> int | None:
    """The process that listens under a worker's name, as `StrangeWorkerError` has it; None: there is none."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as end:
        end.setblocking(False)
        try:
            end.connect(control_name(index))
            pid, user = peer(end)
            return pid if is_ours(user) else -1
        except BlockingIOError:
            return 0  # its queue is full: it is there, and doesn't accept
        except OSError:
            return None


def _is_alive(connection: Connection) -> bool:
    """Whether the other end of a connection is still there: a worker says nothing unasked but its end."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return not poll.poll(0)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Be the only one in this network namespace who starts workers.

    Raises:
        DataplaneError: somebody else is at it for too long.
    """
    deadline = time.monotonic() + 2 * START
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as mutex:
        while True:
            try:
                mutex.bind(_STARTING)
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                    raise DataplaneError(f"userspace: workers cannot be started: {error}") from error
            time.sleep(_POLL)
        yield
