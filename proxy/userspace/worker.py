"""A worker process: `python -m proxy.userspace.worker --index N`.

Theory of operation
-------------------
The agent starts one per core, in its network namespace, and tells it by the control socket what to serve (see
`control`).  From then on the worker needs nobody: it has its own session, no open file of the agent's, and carries on
when the agent ends.  It imports little, as there are several and each is memory of the node.

Everything happens in one event loop: the data path by a poller of its own (see `poller`), control and timers by the
loop.  A large table is applied in steps between which the others have their turn.

A worker is replaced by starting another with a free index, applying the table to it, and draining the old one: both
have sockets at the same places, so no client finds a place without one.  One that drains first lets no new handshake
begin, then serves those that wait, and only then closes: nothing that was accepted is lost, and a client whose first
packet came in between sends it again to the others.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import random
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterable, Mapping

import msgspec

from proxy.peers import is_ours, peer
from proxy.userspace import control
from proxy.userspace.choose import Memory
from proxy.userspace.control import (
    Answer,
    Applied,
    Apply,
    Done,
    Drain,
    Failed,
    Hello,
    Request,
    Stats,
    StatsAnswer,
    Stop,
    Welcome,
)
from proxy.userspace.listeners import Listeners
from proxy.userspace.poller import LoopSelector, Poller
from proxy.userspace.table import Bind, Table
from proxy.userspace.tcp import Tcp
from proxy.userspace.tracing import Watcher, Watchers
from proxy.userspace.udp import Udp
from rules.forwarding import Family, Protocol

_STEP = 100
"""Listeners that are opened or closed before the others have their turn."""
_LOOK = 0.25
"""Seconds between looks at what is overdue."""
_RETRY = 1.0
"""Seconds between tries to open listeners that could not be opened."""
_DESCRIPTORS = 1 << 20
"""How many a worker asks for: what the kernel allows by default."""
_FOR_LISTENERS = 0.75
"""The part of them that may be listeners."""
_FOR_CONTROL = 4
"""How many of them are never a client's: a worker that the next agent cannot talk to would be ended."""
_LAST_CALL = 0.2
"""Seconds in which handshakes that have begun may end, when a worker drains."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is started with; times in seconds."""

    index: int
    workers: int = 1
    """How many there are in all: clients with affinity are spread over so many."""
    max_udp_flows: int = 8192
    connect_timeout: float = 5.0
    tcp_idle: float = 0.0
    """0: no limit."""
    udp_idle: float = 30.0
    udp_stream_idle: float = 180.0
    loop: str = "asyncio"
    foreground: bool = False
    """Stay in the session of whoever started it."""


class Worker:
    """One worker, within its event loop."""

    def __init__(self, options: Options, poller: Poller) -> None:
        """The poller is attached to the running loop already."""
        self._options = options
        self._ended = asyncio.Event()
        self._lock = asyncio.Lock()
        self._draining: float | None = None
        self._poller = poller
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        last = limit - _FOR_CONTROL
        self._tcp = Tcp(
            poller,
            connect_timeout=options.connect_timeout,
            idle_limit=options.tcp_idle,
            last=last,
            listens=self._listens,
        )
        self._udp = Udp(
            poller,
            limit=options.max_udp_flows,
            idle=options.udp_idle,
            stream_idle=options.udp_stream_idle,
            last=last,
            listens=self._listens,
        )
        self._watchers = self._tcp.watchers = self._udp.watchers = Watchers()
        most = int(limit * _FOR_LISTENERS)
        self._listeners = Listeners(self._tcp, self._udp, workers=options.workers, most=most, last=last)
        memory = Memory()
        chance = random.Random()  # noqa: S311  # which backend a connection gets is no secret
        self._tables = {
            family: Table(family, memory=memory, chance=chance, interfaces=_interfaces) for family in Family
        }
        self._connections: set[asyncio.Task[None]] = set()

    def _listens(self, bind: Bind) -> bool:
        return bind in self._listeners

    async def run(self, listener: socket.socket) -> None:
        """Serve the control socket, and all that is asked by it, until it is time to end."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._ended.set)
        self._server = await asyncio.start_unix_server(self._talk, sock=listener)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._look_around()), group.create_task(self._retry())]
                await self._ended.wait()
                for task in tasks:
                    task.cancel()
        finally:
            self._server.close()
            self._listeners.close()
            self._tcp.close()
            self._udp.close()
            self._poller.close()
            for conversation in list(self._connections):
                conversation.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

    # --- control -------------------------------------------------------------------------------------------------

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of the agent, request by request."""
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        watcher = Watcher(self._watchers)
        try:
            if not is_ours(peer(writer.get_extra_info("socket"))[1]):
                return
            while True:
                body = await reader.readexactly(control.body_length(await reader.readexactly(control.HEAD_BYTES)))
                answer, last = await self._answer(body, watcher)
                writer.write(control.frame(answer))
                await writer.drain()
                if last:
                    self._ended.set()
        except (asyncio.IncompleteReadError, asyncio.CancelledError, OSError):
            return  # the agent has gone, or the worker goes
        finally:
            watcher.end()
            self._connections.discard(task)
            writer.close()

    async def _answer(self, body: bytes, watcher: Watcher) -> tuple[Answer, bool]:
        """The answer to one request, and whether it is the last one."""
        try:
            request: Request = control.decode_request(body)
        except msgspec.MsgspecError as error:
            return Failed(f"not understood: {error}"), False
        answer: Answer = Done()
        match request:
            case Hello():
                answer = self._welcome(request)
            case Apply():
                answer = await self._apply(request)
            case control.Table():
                trouble = self._listeners.trouble_of(request.family)
                answer = self._tables[request.family].answer(trouble)
            case Stats():
                answer = self._statistics()
            case control.Trace() | control.Traces():
                answer = watcher.answer(request)
            case Drain():
                await self._drain(request.seconds)
        return answer, isinstance(request, Stop)

    def _welcome(self, hello: Hello) -> Answer:
        if hello.version != control.VERSION:
            return Failed(f"it speaks version {control.VERSION}, not {hello.version}")
        serials = {family: table.serial for family, table in self._tables.items() if table.applied}
        return Welcome(version=control.VERSION, pid=os.getpid(), index=self._options.index, serials=serials)

    async def _apply(self, request: Apply) -> Answer:
        async with self._lock:
            if self._draining is not None:
                return Failed("it is draining")
            if fault := request.fault():
                return Failed(f"not understood: {fault}")
            table = self._tables[request.family]
            await self._settle(table, table.change(request))
            self._tcp.changed(request.family, table.served)
            return Applied(trouble=self._listeners.trouble_of(request.family))

    async def _settle(self, table: Table, binds: Iterable[Bind]) -> None:
        for count, bind in enumerate(binds, 1):
            self._listeners.settle(table, bind)
            if not count % _STEP:
                await asyncio.sleep(0)

    def _statistics(self) -> StatsAnswer:
        self._tcp.account()
        return StatsAnswer(
            frontends=[record for table in self._tables.values() for record in table.statistics()],
            draining=self._draining is not None,
            tcp_connections=len(self._tcp),
            udp_flows=len(self._udp),
            exhausted=self._tcp.exhausted + self._udp.exhausted,
            evicted=self._udp.evicted,
        )

    async def _drain(self, seconds: float) -> None:
        """Accept no more, and end with the last flow, or after so long."""
        if self._draining is not None:
            self._draining = min(self._draining, time.monotonic() + seconds)
            return
        self._draining = time.monotonic() + seconds
        self._server.close()
        async with self._lock:
            self._listeners.stop_new(Protocol.TCP)
            await asyncio.sleep(_LAST_CALL)
            self._listeners.close(emptied=True)

    # --- timers --------------------------------------------------------------------------------------------------

    async def _look_around(self) -> None:
        """End what is overdue, every now and then."""
        before = time.monotonic()
        while True:
            await asyncio.sleep(_LOOK)
            now = time.monotonic()
            self._tcp.look_around(now, now - before)
            self._udp.look_around(now)
            before = now
            if self._draining is not None and (now >= self._draining or not (len(self._tcp) or len(self._listeners))):
                self._ended.set()

    async def _retry(self) -> None:
        """Try again what could not be opened, and follow the node's interfaces."""
        while True:
            await asyncio.sleep(_RETRY)
            async with self._lock:
                for table in self._tables.values():
                    await self._settle(table, self._listeners.troubled(table))
                    await self._settle(table, table.refresh_interfaces())


def _interfaces() -> Mapping[int, str]:
    return dict(socket.if_nameindex())


def parse(arguments: list[str]) -> Options:
    """The options of a command line; exits with a message on a wrong one."""
    parser = argparse.ArgumentParser(prog="python -m proxy.userspace.worker", description=__doc__.partition("\n")[0])
    parser.add_argument("--index", type=int, required=True, help="which one this is, from 0")
    parser.add_argument("--workers", type=int, default=1, help="how many there are")
    parser.add_argument("--max-udp-flows", type=int, default=8192)
    parser.add_argument("--connect-timeout", type=float, default=5.0)
    parser.add_argument("--tcp-idle", type=float, default=0.0, help="seconds; 0: no limit")
    parser.add_argument("--udp-idle", type=float, default=30.0)
    parser.add_argument("--udp-stream-idle", type=float, default=180.0)
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), default="asyncio")
    parser.add_argument("--foreground", action="store_true", help="stay in the session of whoever starts it")
    return Options(**vars(parser.parse_args(arguments)))


def _detach() -> None:
    """Belong to nobody: no terminal, no directory, as many descriptors as the process may have."""
    with contextlib.suppress(PermissionError):  # it leads a session already
        os.setsid()
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    os.chdir("/")


def _raise_limit() -> None:
    """Have as many descriptors as the process may have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < _DESCRIPTORS:
        with contextlib.suppress(ValueError, OSError):  # it needs CAP_SYS_RESOURCE
            resource.setrlimit(resource.RLIMIT_NOFILE, (_DESCRIPTORS, _DESCRIPTORS))
            return
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if not options.foreground:
        _detach()
    _raise_limit()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(control.control_name(options.index))
    except OSError as error:
        sys.stderr.write(f"worker {options.index}: {error.strerror}: there is one already\n")
        return 1
    listener.listen(16)
    listener.setblocking(False)
    poller = Poller()
    # What is there now stays; and flows are no garbage that a collector must find.
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)

    async def run() -> None:
        poller.attach(asyncio.get_running_loop(), nested=options.loop != "asyncio")
        await Worker(options, poller).run(listener)

    with asyncio.Runner(loop_factory=lambda: _new_loop(options.loop, poller)) as runner:
        runner.run(run())
    return 0


def _new_loop(name: str, poller: Poller) -> asyncio.AbstractEventLoop:
    if name == "asyncio":
        return asyncio.SelectorEventLoop(LoopSelector(poller))
    import uvloop  # noqa: PLC0415  # an optional package

    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
