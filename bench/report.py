"""The table of a run, for people and as JSON; and how far it is."""

from __future__ import annotations

import datetime as dt
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec


class Row(msgspec.Struct, frozen=True):
    """One figure, of each checkout that was measured."""

    cluster: str
    what: str
    unit: str
    """`s`, `ms`, `us` or `MB`: what the values are in."""
    values: Mapping[str, float]
    target: float | None = None
    """What it should stay below."""


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """A run."""

    time: str
    machine: str
    rows: list[Row]


def results(rows: Iterable[Row]) -> Results:
    """A run that has just been made."""
    machine = f"{os.cpu_count()} CPUs, Linux {platform.release()}, Python {platform.python_version()}"
    return Results(time=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"), machine=machine, rows=list(rows))


def save(found: Results, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(found)))


def table(found: Results, *, programs: Sequence[str] = (), unit: str = " endpoints") -> str:
    """The run as text; figures beyond their target are marked.

    Columns are the checkouts or programs that were measured, those of the first row unless they are named; `unit` goes
    behind the headings.
    """
    programs = programs or (list(found.rows[0].values) if found.rows else [])
    lines = [f"{found.time}  {found.machine}"]
    cluster = ""
    for row in found.rows:
        if row.cluster != cluster:
            cluster = row.cluster
            heads = "".join(f"{program:>12}" for program in programs)
            lines += ["", f"{f'{cluster}{unit}':<52}{heads}{'target':>10}"]
        values = "".join(f"{_figure(row.values.get(program)):>12}" for program in programs)
        target = "" if row.target is None else f"{_figure(row.target):>10}"
        missed = row.target is not None and row.values[programs[0]] > row.target
        lines.append(f"  {f'{row.what} ({row.unit})':<50}{values}{target}{'  missed' if missed else ''}")
    return "\n".join(lines)


def tell(what: str) -> None:
    """What is being measured, on a terminal, in place of what was said before."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{what}")


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
