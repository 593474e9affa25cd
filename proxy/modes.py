"""The registry of dataplanes, and choosing one for this node."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from proxy.config.settings import IpvsSettings, Settings, UserspaceLimits
from rules.dataplane import Capabilities, Dataplane, DataplaneError, Touch, UnavailableError
from rules.forwarding import Family
from rules.iptables.programs import BACKENDS, Backend, available
from rules.iptables.watch import Watched

BUILT = ("nftables", "iptables", "ipvs", "userspace")
"""The dataplanes that exist, the preferred one first; the last needs nothing of the kernel but sockets."""

IPTABLES = "SLUICE_IPTABLES"
"""The variable that says which iptables to use, `legacy` or `nft`, where no configuration does; without either, the one
in use on the node."""

IPVS_DRAIN = 10.0
"""Seconds that connections through IPVS have to come to their end, after a change to a mode that takes all new ones."""


def choose(mode: str, iptables: str | None = None) -> str:
    """The dataplane for a configured mode; `iptables` as for `open_dataplane`.

    A mode asked for by name is never replaced by another one; "" takes the best that this node has (DESIGN 4.10).

    Raises:
        UnavailableError: this node has none of the modes.
    """
    return mode or _best(iptables)


def _best(iptables: str | None) -> str:
    reasons = []
    for name in BUILT:
        try:
            dataplane = open_dataplane(name, supported_families()[0], iptables)
            try:
                dataplane.check()
            finally:
                dataplane.close()
        except UnavailableError as error:
            reasons.append(f"{name}: {error}")
            continue
        if reasons:
            from proxy.logs import get_logger  # noqa: PLC0415  # 60 ms that dump and verify do without

            get_logger("sluice.modes").warning("mode chosen", mode=name, because="; ".join(reasons))
        return name
    raise UnavailableError("; ".join(reasons))


def present() -> tuple[str, ...]:
    """The dataplanes that may hold something on this node: one whose programs are not there holds nothing."""
    return tuple(name for name in BUILT if _may_hold(name))


def _may_hold(name: str) -> bool:
    if name == "iptables":
        return any(available(family) for family in Family)
    if name == "userspace":
        from proxy.userspace.supervisor import anything_left  # noqa: PLC0415  # one dataplane of several is loaded

        return anything_left()
    if name == "ipvs":
        # Nothing is loaded to find out.
        return Path("/proc/thread-self/net/ip_vs").exists()
    return True


def open_dataplane(
    name: str,
    family: Family,
    iptables: str | None = None,
    userspace: UserspaceLimits | None = None,
    ipvs: IpvsSettings | None = None,
) -> Dataplane:
    """The dataplane of a name and a family, in the network namespace of the calling thread.

    Args:
        name: the mode's.
        family: the family.
        iptables: `legacy` or `nft`, as configured (`iptablesBackend`); without, what SLUICE_IPTABLES says, else the one
            in use on the node.
        userspace: what limits userspace mode, as configured; workers that run keep what they were started with.
        ipvs: how mode ipvs is configured; None: it isn't known, and nothing is to be written.

    Raises:
        UnavailableError: this node cannot run it; the message says what is missing.
    """
    if name == "iptables":
        from rules.iptables.dataplane import IptablesDataplane  # noqa: PLC0415  # one dataplane of several is loaded

        return IptablesDataplane(family, _iptables_backend(iptables))
    if name == "userspace":
        from proxy.userspace.dataplane import UserspaceDataplane  # noqa: PLC0415  # one dataplane of several is loaded

        return UserspaceDataplane(family, userspace or UserspaceLimits())
    if name == "ipvs":
        return _open_ipvs(family, _iptables_backend(iptables), ipvs)
    if name != "nftables":
        raise UnavailableError(f"there is no dataplane {name}")
    # pyroute2 costs 0.1 s and 13 MB: help, version and render do without.
    from rules.nftables.dataplane import NftablesDataplane  # noqa: PLC0415

    return NftablesDataplane(family)


def _open_ipvs(family: Family, iptables: Backend | None, settings: IpvsSettings | None) -> Dataplane:
    from rules.ipvs.dataplane import IpvsDataplane, Options  # noqa: PLC0415  # as above
    from rules.ipvs.messages import Timeouts  # noqa: PLC0415  # as above

    if settings is None:
        return IpvsDataplane(family, Options(scheduler=None), iptables)
    seconds = (settings.tcp_timeout, settings.tcp_fin_timeout, settings.udp_timeout)
    options = Options(
        scheduler=settings.scheduler, excluded=settings.excluded, timeouts=Timeouts(*(int(each) for each in seconds))
    )
    return IpvsDataplane(family, options, iptables)


def read_as(dataplane: Dataplane, writer: Capabilities) -> None:
    """Tell a dataplane that was opened to read what the one can do that writes: in mode ipvs, its usual scheduler."""
    if isinstance(dataplane, _ToldOfItsWriter):
        dataplane.read_as(writer)


def meet_workers(dataplanes: Sequence[Dataplane]) -> None:
    """Before the first sync: see to it that rules cut no connection that userspace mode's workers carry.

    Where there are any, it takes a second.

    Raises:
        DataplaneError: the rules for it could not be written.
    """
    if dataplanes[0].name != "userspace" and _may_hold("userspace"):
        from proxy.userspace.handover import meet  # noqa: PLC0415  # one dataplane of several is loaded

        meet(dataplanes)


def release_others(dataplane: Dataplane) -> float:
    """Have what other modes have left in a dataplane's family give way to it; in how many seconds it can be removed."""
    if dataplane.name != "userspace" and not _may_hold("userspace"):
        return _ipvs_drain(dataplane)
    from proxy.userspace.dataplane import UserspaceDataplane  # noqa: PLC0415  # one dataplane of several is loaded
    from proxy.userspace.handover import release  # noqa: PLC0415  # likewise

    drain = dataplane.drain if isinstance(dataplane, UserspaceDataplane) else 0.0
    with contextlib.ExitStack() as stack:
        return max((release(other, drain) for other in _others(dataplane, stack)), default=0.0)


def _ipvs_drain(dataplane: Dataplane) -> float:
    """For how many seconds IPVS goes on beside rules of another mode: connections that it has end with its servers."""
    with contextlib.ExitStack() as stack, contextlib.suppress(DataplaneError):
        held = (each for each in _others(dataplane, stack) if each.name == "ipvs")
        return max((IPVS_DRAIN for each in held if each.read() is not None), default=0.0)
    return 0.0


def opener(settings: Settings) -> Callable[[str, Family], Dataplane]:
    """`open_dataplane` of a name and a family, as configured."""
    return lambda name, family: open_dataplane(
        name, family, settings.iptables_backend, settings.userspace, settings.ipvs
    )


def remove_others(dataplane: Dataplane) -> list[str]:
    """Remove what other modes have left in a dataplane's family, now that its own rules are there; which ones had.

    Raises:
        DataplaneError: something could not be removed.
    """
    removed = []
    with contextlib.suppress(UnavailableError):  # what this kernel knows nothing of is not there
        if isinstance(dataplane, _ByIptables) and dataplane.remove_other():
            removed.append("iptables of the other kind")
    with contextlib.ExitStack() as stack:
        for other in _others(dataplane, stack):
            with contextlib.suppress(UnavailableError):  # as above
                if other.cleanup():
                    removed.append(other.name)
    return removed


def _others(dataplane: Dataplane, stack: contextlib.ExitStack) -> Iterator[Dataplane]:
    """The dataplanes of the other modes that may hold something in a family, each closed with the stack."""
    for name in present():
        if name == dataplane.name:
            continue
        try:
            other = open_dataplane(name, dataplane.family)
        except UnavailableError:
            continue  # what cannot be opened holds nothing
        stack.callback(other.close)
        yield other


def _iptables_backend(configured: str | None) -> Backend | None:
    """The kind of programs that is asked for, by the configuration or else by the environment."""
    for name, asked in (("iptablesBackend", configured), (IPTABLES, os.environ.get(IPTABLES))):
        for backend in BACKENDS:
            if asked == backend:
                return backend
        if asked:
            raise UnavailableError(f"{name}={asked}: must be {' or '.join(BACKENDS)}, or not be set")
    return None


class Watch(Protocol):
    """Notices that another process touched our rules; readable when there is something to look at."""

    def fileno(self) -> int: ...

    def touched(self) -> Collection[Touch]:
        """Who may have changed our rules since the last call."""

    def close(self) -> None: ...


@runtime_checkable
class _ByIptables(Watched, Protocol):
    """A dataplane that writes rules by iptables programs, of one kind or the other."""

    def remove_other(self) -> bool:
        """Remove what the other kind of programs holds of ours; whether there was any."""


@runtime_checkable
class _ToldOfItsWriter(Protocol):
    """A dataplane that cannot read from the kernel all that its writer can do."""

    def read_as(self, writer: Capabilities) -> None:
        """From here on, read what a dataplane of these capabilities has written."""


def watch(dataplanes: Sequence[Dataplane]) -> Watch:
    """A watch over the rules of these dataplanes of one mode; what they do themselves is not noticed.

    Raises:
        OSError: the kernel offers none.
    """
    written = [each for each in dataplanes if isinstance(each, _ByIptables)]
    if written:
        from rules.iptables.watch import Watch as IptablesWatch  # noqa: PLC0415  # as above

        return IptablesWatch(written)
    from proxy.userspace.dataplane import UserspaceDataplane  # noqa: PLC0415  # as above

    workers = [each for each in dataplanes if isinstance(each, UserspaceDataplane)]
    if workers:
        from proxy.userspace.watch import Watch as WorkersWatch  # noqa: PLC0415  # as above

        return WorkersWatch(workers)
    from rules.nftables.dataplane import NftablesDataplane, watch_tables  # noqa: PLC0415  # as above

    return watch_tables(each for each in dataplanes if isinstance(each, NftablesDataplane))


def supported_families(proc: Path = Path("/proc")) -> tuple[Family, ...]:
    """The families that this network namespace can carry (CFG-62)."""
    disabled = proc / "sys/net/ipv6/conf/all/disable_ipv6"
    has_ipv6 = (proc / "net/if_inet6").exists() and disabled.read_text().strip() == "0"
    return (Family.IPV4, Family.IPV6) if has_ipv6 else (Family.IPV4,)
