"""`sluice dump`: what the kernel holds now, by Service, decompiled from its own rules."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import NamedTuple

from proxy import modes
from proxy.output import Format, Shown, select, write
from rules.dataplane import Dataplane, DataplaneError
from rules.forwarding import Address, Family, Frontend, Route

Open = Callable[[str, Family], Dataplane]


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


def main(format_: Format, wanted: Filter, *, open_dataplane: Open = modes.open_dataplane) -> int:
    """Print what every dataplane holds; 0, 1 if nothing is what was asked for, 2 if something could not be read."""
    shown, failures = read_all(open_dataplane)
    for failure in failures:
        sys.stderr.write(f"sluice dump: {failure}\n")
    if failures and not shown:
        return 2
    asked = wanted != Filter()
    if asked:
        shown = [each._replace(table=select(each.table, wanted.admits)) for each in shown]
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
    open_dataplane: Open = modes.open_dataplane, names: Iterable[str] = modes.BUILT
) -> tuple[list[Shown], list[str]]:
    """The tables that dataplanes hold, and why some could not be read, one line each."""
    shown = []
    failures: dict[str, None] = {}
    for name in names:
        for family in Family:
            try:
                dataplane = open_dataplane(name, family)
                try:
                    table = dataplane.read()
                finally:
                    dataplane.close()
            except DataplaneError as error:
                failures[str(error)] = None
                continue
            if table is not None:
                shown.append(Shown(name, table))
    return shown, list(failures)


def _addresses(frontend: Frontend, route: Route) -> set[Address]:
    backends = route.backends | (route.local_backends or frozenset())
    return {frontend.address, *(backend.address for backend in backends)}
