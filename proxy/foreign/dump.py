"""`sluice dump` of another proxy's rules: by Service, as of our own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from proxy.dump import Filter
from proxy.foreign.sources import PROXY, Found, from_files, from_node
from proxy.output import Format, Shown, select, write
from rules.dataplane import DataplaneError
from rules.foreign.gathering import ForeignError

Read = Callable[[], Sequence[Found]]


def main(files: Sequence[str], format_: Format, wanted: Filter, *, read: Read = from_node) -> int:
    """Print what files of rules hold, or without any this node; 0, 1 if nothing is what was asked for, 2 on failure."""
    try:
        found = from_files(files) if files else list(read())
    except (ForeignError, DataplaneError) as error:
        sys.stderr.write(f"sluice dump: {error}\n")
        return 2
    for note in dict.fromkeys(note for each in found for note in each.reading.notes):
        sys.stderr.write(f"sluice dump: {note}\n")
    asked = wanted != Filter()
    shown = []
    for each in found:
        table = select(each.reading.table, wanted.admits) if asked else each.reading.table
        where = f" ({each.where})" if len(files) > 1 else ""
        shown.append(Shown(f"{each.title}{where}", table))
    write(shown, format_)
    if not shown:
        sys.stderr.write(f"sluice dump: {PROXY} has no rules in this network namespace\n")
        return 1 if asked else 0
    if asked and not any(each.table.routes for each in shown):
        nameless = any(each.reading.mode == "ipvs" for each in found) and (wanted.namespace or wanted.service)
        more = "; in ipvs mode nothing has the names of Services: ask by --address or --port" if nameless else ""
        sys.stderr.write(f"sluice dump: no frontend is what was asked for{more}\n")
        return 1
    return 0
