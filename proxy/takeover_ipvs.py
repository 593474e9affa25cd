"""What kube-proxy's mode ipvs has left outside of iptables, and removing it: servers, a device, sets (IPVS-30).

kube-proxy's own clean-up flushes all of IPVS.  Here a virtual server goes where something that is only kube-proxy's
says that it is kube-proxy's too: its address is on kube-ipvs0, or one of the sets KUBE-... names it.  Others stay, and
so does what our own mode ipvs serves, which took such servers over as they were.

First the servers go, so that no connection meets one without the rules that masquerade it; then the device; the sets
last, once no rule refers to them.  Modules are not loaded to find out: a kernel without IPVS has nothing of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from rules.dataplane import DataplaneError
from rules.foreign import kube_proxy_ipvs_sets
from rules.foreign.ipvs_state import KeptSet
from rules.foreign.kube_proxy_ipvs_sets import Set, Sets
from rules.foreign.removal import has_server
from rules.forwarding import Family
from rules.ipvs import DEVICE, KUBE_PROXYS_DEVICE
from rules.ipvs.device import Device
from rules.ipvs.kernel import Kernel
from rules.ipvs.messages import Key, delete_server
from rules.ipvs.services import Ipvs
from rules.netlink.ipset import Ipsets

_PROXY = "kube-proxy"
_PROC, _SYS = Path("/proc"), Path("/sys")


def left(proc: Path = _PROC) -> list[str]:
    """What of mode ipvs is there and stays, a sentence each; it does not say which servers are whose."""
    devices = _text(proc / "thread-self/net/dev")
    # Three lines of heading; those of real servers are indented.
    servers = [line for line in _text(proc / "thread-self/net/ip_vs").splitlines()[3:] if line[:1] != " "]
    found = []
    # Where mode ipvs is ours, these are our servers.
    if servers and f"{DEVICE}:" not in devices:
        found.append(f"{len(servers)} virtual servers of ipvs stay, for the connections that are open: {_HOW}")
    if f"{KUBE_PROXYS_DEVICE}:" in devices:
        found.append(f"the device {KUBE_PROXYS_DEVICE} of {_PROXY}'s mode ipvs stays: {_HOW}")
    return found


def remove_servers(proc: Path = _PROC, sys: Path = _SYS) -> Iterator[str]:
    """Remove kube-proxy's virtual servers and its device, and say what was removed and what stays, a line each.

    Connections through these servers end.

    Raises:
        DataplaneError: something could not be removed; what was said before is gone.
    """
    with contextlib.ExitStack() as stack:
        device = stack.enter_context(Device(KUBE_PROXYS_DEVICE))
        if (proc / "thread-self/net/ip_vs").exists():
            held = _held(sys)
            ipvs = stack.enter_context(Ipvs())
            found = [server.key for server in ipvs.servers()]
            ours = _ours() if found else frozenset()
            for family in Family:
                bound, own = device.addresses(family), device.elsewhere(family)
                sets = Sets(held, family)
                others = [key for key in found if key.family is family and key not in ours]
                theirs = [key for key in others if has_server(key, sets, bound, own)]
                refused = ipvs.send([delete_server(key) for key in theirs])
                if refused:
                    raise DataplaneError(f"a virtual server of {_PROXY}'s could not be removed: {refused[0].reason}")
                if theirs:
                    yield f"removed {_PROXY}'s ipvs servers for {family.label}: {_count(len(theirs), 'virtual server')}"
                if stay := len(others) - len(theirs):
                    servers = _count(stay, "virtual server")
                    yield f"of ipvs for {family.label}, {servers} of others stay: nothing of {_PROXY}'s names them"
        if device.delete():
            yield f"removed the device {KUBE_PROXYS_DEVICE} of {_PROXY}'s mode ipvs"


def remove_sets(sys: Path = _SYS) -> Iterator[str]:
    """Remove the sets of both families, to which no rule may refer any more, and say how many.

    Raises:
        DataplaneError: one could not be removed, mostly as a rule of somebody else refers to it; the others are gone.
    """
    if not _has_sets(sys):
        return
    failures = []
    removed = 0
    with Ipsets() as sets:
        for name in sorted(sets.names() & _NAMES):
            try:
                removed += sets.destroy(name)
            except DataplaneError as error:
                failures.append(str(error))
    if removed:
        yield f"removed {_PROXY}'s ipsets: {_count(removed, 'set')}"
    if failures:
        raise DataplaneError("; ".join(failures))


def _held(sys: Path) -> Mapping[str, KeptSet]:
    """kube-proxy's sets, with their elements; those that make no sense left out, as they name no server."""
    found = {}
    if _has_sets(sys):
        with Ipsets() as sets:
            for name in sets.names() & _NAMES:
                with contextlib.suppress(DataplaneError):
                    held = sets.held(name)
                    if held is not None and held.spec is not None:
                        found[name] = KeptSet(held.spec.type, held.spec.family, frozenset(held.elements))
    return found


def _ours() -> frozenset[Key]:
    """The virtual servers that an agent of ours in mode ipvs serves."""
    with Device() as device:
        if not device.exists():
            return frozenset()
    found: set[Key] = set()
    for family in Family:
        with contextlib.closing(Kernel(family)) as kernel:
            found.update(kernel.find().state.servers)
    return frozenset(found)


def _has_sets(sys: Path) -> bool:
    return (sys / "module/ip_set").exists()


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


_NAMES = frozenset(kube_proxy_ipvs_sets.name(which, family) for which in Set for family in Family)
_HOW = f"sluice cleanup --of {_PROXY} removes what is {_PROXY}'s"
