"""What an agent holds while it runs: the lock of its network namespace, its dataplanes, its source of objects."""

from __future__ import annotations

import contextlib
import re
import resource
import time
from functools import partial
from pathlib import Path

from proxy import modes
from proxy.config.settings import Settings
from proxy.lock import HeldError, Lock
from proxy.logs import get_logger
from proxy.report import Unserved
from proxy.serving.metrics import Metrics
from proxy.sources.base import Source
from proxy.sources.credentials_reading import Reading
from rules.dataplane import Dataplane, UnavailableError
from rules.forwarding import Family

_log = get_logger("sluice.agent")

MOST_DESCRIPTORS = 65536
TAKEOVER_POLL = 0.2
_CAP_NET_ADMIN = 12


class FatalError(Exception):
    """The agent cannot go on; the message is its last line."""


def make_room() -> None:
    """Have as many files open as this process may, within reason: each health-check node port takes some."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def take_lock(settings: Settings) -> Lock:
    """The lock of this network namespace (DESIGN 4.11); with `--takeover`, once its holder has ended.

    Raises:
        HeldError: another agent holds it.
    """
    told = False
    while True:
        try:
            return Lock()
        except HeldError as error:
            if not settings.takeover:
                raise HeldError(f"{error}; stop it first, or use --takeover to wait for its end") from None
            if not told:
                _log.info("waiting", reason=str(error))
                told = True
            time.sleep(TAKEOVER_POLL)


def open_dataplanes(settings: Settings) -> tuple[list[Dataplane], list[Unserved]]:
    """The dataplane of each family that this node can carry, and why it cannot carry the others.

    Raises:
        UnavailableError: there is none.
    """
    name = _mode(settings)
    opened: list[Dataplane] = []
    unserved: list[Unserved] = []
    lacking: list[UnavailableError] = []
    supported = modes.supported_families()
    for family in Family:
        if family not in supported:
            unserved.append(Unserved(family=family.label, reason="it is switched off on this node (disable_ipv6)"))
            continue
        try:
            dataplane = modes.open_dataplane(name, family, settings.iptables_backend, settings.userspace, settings.ipvs)
            with contextlib.ExitStack() as undo:
                undo.callback(dataplane.close)
                dataplane.check()
                undo.pop_all()
            opened.append(dataplane)
        except UnavailableError as error:
            lacking.append(error)
            unserved.append(Unserved(family=family.label, reason=str(error)))
    if not opened and lacking:
        raise lacking[0]
    for each in unserved:
        _log.warning("family not served", family=each.family, reason=each.reason)
    return opened, unserved


def _mode(settings: Settings) -> str:
    """The mode to run in; without the privilege for rules the one that needs none, unless another is asked for."""
    if settings.mode == "userspace" or has_net_admin():
        return modes.choose(settings.mode, settings.iptables_backend)
    lacking = "CAP_NET_ADMIN: run sluice as root, or give its container NET_ADMIN and NET_RAW"
    without = "mode userspace does without, and then serves node ports and the node's own addresses alone"
    if settings.mode:
        raise UnavailableError(f"mode {settings.mode} needs the capability {lacking}; {without}")
    _log.warning("mode chosen", mode="userspace", because=f"this process lacks {lacking}; {without}")
    return "userspace"


def has_net_admin(status: Path = Path("/proc/self/status")) -> bool:
    """Whether this process may change the kernel's rules; where nobody tells, the kernel will."""
    try:
        found = re.search(r"^CapEff:\s*([0-9a-f]+)$", status.read_text(), re.MULTILINE)
    except OSError:
        return True
    return found is None or bool(int(found[1], 16) >> _CAP_NET_ADMIN & 1)


async def open_source(settings: Settings, node_name: str, metrics: Metrics, reading: Reading | None) -> Source:
    """Where the objects come from; `reading` is a child that reads the API server's credentials already.

    Raises:
        FatalError: there are no credentials for the API server.
    """
    if settings.manifests:
        from proxy.sources.manifests import ManifestSource  # noqa: PLC0415  # one source of the two is loaded

        return ManifestSource(settings.manifests, node_name)
    from proxy.sources.apiserver import ApiServer  # noqa: PLC0415  # likewise
    from proxy.sources.credentials import CredentialsError  # noqa: PLC0415  # likewise
    from proxy.sources.pace import Pace  # noqa: PLC0415  # likewise

    try:
        pace = Pace(settings.api_qps, settings.api_burst)
        server = await ApiServer.open(settings.kubeconfig, settings.master, node_name, reading=reading, pace=pace)
    except CredentialsError as error:
        raise FatalError(str(error)) from None
    server.watch_answers(partial(metrics.api_answered, server.host))
    return server
