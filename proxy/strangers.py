"""Looking at the kernel again when another process has touched our rules (DESIGN 4.2)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from proxy import modes
from proxy.logs import get_logger
from proxy.sync import FamilySync
from rules.dataplane import Dataplane

_log = get_logger("sluice.agent")


async def watch_strangers(dataplanes: Sequence[Dataplane], syncs: Sequence[FamilySync]) -> None:
    """Have the syncs of a family doubt what they know whenever somebody else touched its rules; until cancelled."""
    loop = asyncio.get_running_loop()
    try:
        watch = modes.watch(dataplanes)
    except OSError as error:
        _log.warning("changes by other processes are noticed hourly only", reason=str(error))
        return
    with contextlib.closing(watch):
        loop.add_reader(watch.fileno(), _doubt, watch, syncs)
        try:
            await loop.create_future()
        finally:
            loop.remove_reader(watch.fileno())


def _doubt(watch: modes.Watch, syncs: Sequence[FamilySync]) -> None:
    for family, by in watch.touched():
        for sync in syncs:
            if sync.family is family:
                sync.doubt([by] if by is not None else [])
