"""Profiles of the running agent, where kube-proxy has pprof: where the CPU time goes, what holds memory, who waits.

    /debug/pprof/                    what there is
    /debug/pprof/profile?seconds=30  CPU time by stack, collapsed: one line for each, as flame graph tools read it;
                                     with debug=1 a table of functions
    /debug/pprof/heap                what the process holds, and how many objects of which type
    /debug/pprof/goroutine           the stacks of all threads and tasks
    /debug/pprof/cmdline             the command line

A thread samples the stacks of all others, at random moments.  While it does, whoever runs gives up the interpreter's
lock within microseconds: otherwise it would be seen only where it does so by itself, at its system calls.  Samples of
threads that wait count for nothing; the others share the CPU time that the kernel says the thread has used.
"""

from __future__ import annotations

import asyncio
import gc
import io
import random
import sys
import threading
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CodeType, FrameType
from typing import NamedTuple

from proxy.serving.messages import Request, Response, not_found, text

PREFIX = "/debug/pprof/"
SECONDS = 30.0
"""How long a profile takes, unless it is said."""
LONGEST = 300.0
INTERVAL = 0.01
"""Seconds between samples."""

_WAITING = {"selectors", "threading", "queue", "concurrent.futures.thread"}
"""Modules whose functions, innermost in a stack, wait for something."""
_SWITCH_INTERVAL = 1e-5
_SHOWN = 40
"""Lines of a table."""
_TASKS = Path("/proc/self/task")


class Frame(NamedTuple):
    """A function in a stack."""

    module: str
    function: str

    def __str__(self) -> str:
        return f"{self.module}:{self.function}"


_UNSEEN = Frame("", "(too short to be seen)")

Stack = tuple[str | Frame, ...]
"""A thread's name and its functions, the outermost first."""


class Profiles:
    """Answers what is asked below /debug/pprof/; one CPU profile at a time."""

    def __init__(self) -> None:
        self._profiling = False

    async def answer(self, request: Request) -> Response:
        """The answer to a request below the prefix."""
        match request.path.removeprefix(PREFIX):
            case "":
                return text(_INDEX)
            case "cmdline":
                return text("\0".join(sys.orig_argv))
            case "profile":
                return await self._profile(request)
            case "heap" | "allocs":
                return text(await asyncio.to_thread(heap))
            case "goroutine" | "threads":
                return text(stacks())
            case _:
                return not_found()

    async def _profile(self, request: Request) -> Response:
        asked = request.argument("seconds")
        try:
            seconds = float(asked or SECONDS)
        except ValueError:
            seconds = 0.0
        if not 0 < seconds <= LONGEST:
            return text(f"seconds must be a number above 0, up to {LONGEST:g}\n", 400)
        if self._profiling:
            return text("another CPU profile is being taken\n", 500)
        self._profiling = True
        sampler = Sampler()
        try:
            sampler.start()
            await asyncio.sleep(seconds)
        finally:
            self._profiling = False
            sampler.stop()
        taken = sampler.taken()
        return text(table(taken) if request.argument("debug") not in {"", "0"} else collapsed(taken))


class Sampler:
    """Samples the stacks of this process from a thread of its own."""

    def __init__(self, interval: float = INTERVAL) -> None:
        """A sampler that takes a sample every `interval` seconds on average."""
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="profile", daemon=True)
        self._samples: dict[int, Counter[Stack]] = {}
        """By thread, how often it was seen in a stack."""
        self._used: dict[int, tuple[str, int]] = {}
        """By thread, its name and the nanoseconds for which it has run since the start."""
        self._names: dict[CodeType, Frame] = {}

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Sample no more; it does not wait for the thread."""
        self._stop.set()

    def taken(self) -> dict[Stack, float]:
        """CPU seconds by stack, after the stop."""
        self._thread.join()
        weights: Counter[Stack] = Counter()
        for thread, (name, used) in self._used.items():
            seen = self._samples.get(thread) or Counter({(name, _UNSEEN): 1})
            share = used / seen.total()
            for stack, count in seen.items():
                weights[stack] += round(share * count)
        return {stack: nanoseconds / 1e9 for stack, nanoseconds in weights.items() if nanoseconds > 0}

    def _run(self) -> None:
        interval = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_INTERVAL)
        try:
            first = {thread.native_id or 0: _cpu_time(thread.native_id) for thread in threading.enumerate()}
            while not self._stop.wait(self._interval * random.uniform(0.5, 1.5)):  # noqa: S311  # hides nothing
                self._sample(first)
        finally:
            sys.setswitchinterval(interval)

    def _sample(self, first: dict[int, int]) -> None:
        frames = sys._current_frames()  # noqa: SLF001  # the documented way to them
        for thread in threading.enumerate():
            frame, number = frames.get(thread.ident or 0), thread.native_id or 0
            if thread is self._thread or frame is None:
                continue
            now = _cpu_time(number)
            used = now - first.setdefault(number, now)
            before = self._used.get(number, ("", 0))[1]
            self._used[number] = thread.name, used
            if used > before and frame.f_globals.get("__name__") not in _WAITING:
                stack: Stack = (thread.name, *self._functions(frame))
                self._samples.setdefault(number, Counter())[stack] += 1

    def _functions(self, frame: FrameType | None) -> Iterator[Frame]:
        found = []
        while frame is not None:
            code = frame.f_code
            if code not in self._names:
                module = str(frame.f_globals.get("__name__", code.co_filename))
                self._names[code] = Frame(module, code.co_qualname)
            found.append(self._names[code])
            frame = frame.f_back
        return reversed(found)


def _cpu_time(thread: int | None) -> int:
    """Nanoseconds for which a thread of this process has run; 0: it has ended."""
    try:
        return int((_TASKS / str(thread) / "schedstat").read_bytes().split()[0])
    except (OSError, ValueError, IndexError):
        return 0


def collapsed(taken: Mapping[Stack, float]) -> str:
    """A line for each stack, with its CPU time in microseconds at the end."""
    lines = sorted(f"{';'.join(map(str, stack))} {round(seconds * 1e6)}\n" for stack, seconds in taken.items())
    return "".join(lines)


def table(taken: Mapping[Stack, float]) -> str:
    """The functions in which the time was spent, and those that led to them."""
    own: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for stack, seconds in taken.items():
        own[str(stack[-1])] += seconds  # type: ignore[assignment]  # a Counter counts seconds as well
        for name in {*map(str, stack[1:])}:
            total[name] += seconds  # type: ignore[assignment]  # likewise
    whole = sum(taken.values())
    lines = [f"CPU time {whole:.3f} s", "", f"{'own':>9} {'%':>6} {'with what it called':>20}  function"]
    for name, seconds in own.most_common(_SHOWN):
        lines.append(f"{seconds:9.3f} {100 * seconds / whole:6.1f} {total[name]:20.3f}  {name}")
    return "\n".join([*lines, ""])


def heap() -> str:
    """What the process holds; it takes some time with many objects."""
    found = _memory()
    objects = gc.get_objects()
    kinds = Counter(map(type, objects)).most_common(_SHOWN)
    lines = [
        *(f"{name:<24}{size / 1e6:9.1f} MB" for name, size in found.items()),
        "",
        f"{len(objects)} objects that the collector follows, and {gc.get_freeze_count()} that it leaves alone for good",
        *(f"{count:9}  {kind.__module__}.{kind.__qualname__}" for kind, count in kinds),
        "",
    ]
    del objects
    if tracemalloc.is_tracing():
        statistics = tracemalloc.take_snapshot().statistics("lineno")[:_SHOWN]
        lines += ["allocations by line (tracemalloc)", *map(str, statistics)]
    else:
        lines.append("allocations are not traced: start the agent with PYTHONTRACEMALLOC=1 in its environment")
    return "\n".join([*lines, ""])


def _memory() -> dict[str, int]:
    """Bytes of the process, as the kernel counts them."""
    try:
        rows = [line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]]
    except OSError:
        return {}
    sizes = {row[0].removesuffix(":"): int(row[1]) * 1024 for row in rows if len(row) == 3}
    uss = sizes.get("Private_Clean", 0) + sizes.get("Private_Dirty", 0)
    return {"resident (RSS)": sizes.get("Rss", 0), "its own (USS)": uss, "swapped out": sizes.get("Swap", 0)}


def stacks() -> str:
    """Where every thread and every task is; on the event loop's thread."""
    out = io.StringIO()
    frames = sys._current_frames()  # noqa: SLF001  # the documented way to them
    for thread in threading.enumerate():
        out.write(f"thread {thread.name}\n")
        frame = frames.get(thread.ident or 0)
        while frame is not None:
            out.write(f"    {frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_qualname}\n")
            frame = frame.f_back
    for task in sorted(asyncio.all_tasks(), key=asyncio.Task.get_name):
        out.write("\n")
        task.print_stack(file=out)
    return out.getvalue()


_INDEX = f"""/debug/pprof/

profile     CPU time by stack, over ?seconds=N ({SECONDS:g}); with &debug=1 by function
heap        what the process holds, and how many objects of which type
goroutine   the stacks of all threads and tasks
cmdline     the command line
"""
