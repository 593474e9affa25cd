"""`sluice dump`: what the kernel holds now, by Service, decompiled from its own rules."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple, TypeVar

from proxy import modes
from proxy.output import Format, Shown, select, write
from rules.dataplane import Dataplane, DataplaneError, Raw
from rules.forwarding import Address, Family, Frontend, Route

Open = Callable[[str, Family], Dataplane]
T = TypeVar("T")

SHOWN_SERVICES = 3
"""How many Services stand behind an object that serves several."""


class Filter(NamedTuple):
    """Which routes are asked for; what is None or empty admits all."""

    namespace: str = ""
    service: str = ""
    address: Address | None = None
    """Of the frontend or of a backend."""
    port: int = 0

    def admits(self, frontend: Frontend, route: Route) -> bool:
        namespace, _, rest = route.label.partition("/")
        name = rest.partition(":")[0]
        return (
            self.namespace in {"", namespace}
            and self.service in {"", name, f"{namespace}/{name}", route.label}
            and self.port in {0, frontend.port}
            and (self.address is None or self.address in _addresses(frontend, route))
        )


def main(format_: Format | Literal["raw"], wanted: Filter, *, open_dataplane: Open = modes.open_dataplane) -> int:
    """Print what every dataplane holds; 0, 1 if nothing is what was asked for, 2 if something could not be read."""
    if format_ == "raw":
        raws, failures = _read_all(lambda dataplane: dataplane.raw(), open_dataplane, modes.present())
        shown = [Shown(name, raw.table) for name, raw in raws]
    else:
        raws = []
        shown, failures = read_all(open_dataplane)
    for failure in failures:
        sys.stderr.write(f"sluice dump: {failure}\n")
    if failures and not shown:
        return 2
    asked = wanted != Filter()
    if asked:
        shown = [each._replace(table=select(each.table, wanted.admits)) for each in shown]
    if format_ == "raw":
        for _, raw in raws:
            sys.stdout.writelines(f"{line}\n" for line in raw_lines(raw, wanted))
    else:
        write(shown, format_)
    if failures:
        return 2
    if not shown:
        sys.stderr.write("sluice dump: nothing of sluice is in the kernel of this network namespace\n")
        return 1 if asked else 0
    if asked and not any(each.table.routes for each in shown):
        sys.stderr.write("sluice dump: no frontend is what was asked for\n")
        return 1
    return 0


def read_all(
    open_dataplane: Open = modes.open_dataplane, names: Iterable[str] | None = None
) -> tuple[list[Shown], list[str]]:
    """The tables that dataplanes hold, and why some could not be read, one line each."""
    names = modes.present() if names is None else names
    found, failures = _read_all(lambda dataplane: dataplane.read(), open_dataplane, names)
    return [Shown(name, table) for name, table in found], failures


def raw_lines(raw: Raw, wanted: Filter) -> Iterator[str]:
    """A dataplane's own objects, indented, each with the Services that it serves.

    With a filter, those alone that serve a route which it admits, and what they stand in.
    """
    admitted = {frontend for frontend, route in raw.table.routes.items() if wanted.admits(frontend, route)}
    above: dict[int, str] = {}
    """What stands above the next line and is not printed yet, by depth."""
    for depth, text, frontends in raw.items:
        names = dict.fromkeys(raw.table.routes[each].label or str(each) for each in frontends)
        line = f"{'  ' * depth}{text}"
        if names:
            shown = ", ".join(list(names)[:SHOWN_SERVICES])
            line += f"  # {shown}{f' +{len(names) - SHOWN_SERVICES} more' if len(names) > SHOWN_SERVICES else ''}"
        if wanted == Filter():
            yield line
            continue
        above = {place: each for place, each in above.items() if place < depth}
        if admitted.isdisjoint(frontends):
            above[depth] = line
        else:
            yield from above.values()
            yield line
            above.clear()


def _read_all(
    read: Callable[[Dataplane], T | None], open_dataplane: Open, names: Iterable[str]
) -> tuple[list[tuple[str, T]], list[str]]:
    """What a method of every dataplane returns, with the dataplane's name, and failures."""
    found = []
    failures: dict[str, None] = {}
    for name in names:
        for family in Family:
            try:
                dataplane = open_dataplane(name, family)
                try:
                    value = read(dataplane)
                finally:
                    dataplane.close()
            except DataplaneError as error:
                failures[str(error)] = None
                continue
            if value is not None:
                found.append((name, value))
    return found, list(failures)


def _addresses(frontend: Frontend, route: Route) -> set[Address]:
    backends = route.backends | (route.local_backends or frozenset())
    return {frontend.address, *(backend.address for backend in backends)}
