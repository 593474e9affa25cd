"""The registry of dataplanes, and choosing one for this node."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from rules.dataplane import Dataplane, UnavailableError
from rules.forwarding import Family

BUILT = ("nftables",)
"""The dataplanes that exist, the preferred one first."""

PLANNED = ("iptables", "ipvs", "userspace")
"""Modes that have a name and are not built yet."""


def choose(mode: str) -> str:
    """The dataplane for a configured mode.

    A mode asked for by name is never replaced by another one; "" takes the preferred dataplane (DESIGN 4.10).

    Raises:
        UnavailableError: the mode is not built yet.
    """
    if not mode:
        return BUILT[0]
    if mode not in BUILT:
        raise UnavailableError(
            f"mode {mode} is not built yet: use mode {' or '.join(BUILT)}, or leave the mode empty to let sluice choose"
        )
    return mode


def open_dataplane(name: str, family: Family) -> Dataplane:
    """The dataplane of a name and a family, in the network namespace of the calling thread.

    Raises:
        UnavailableError: this node cannot run it; the message says what is missing.
    """
    if name != "nftables":
        raise UnavailableError(f"there is no dataplane {name}")
    # pyroute2 costs 0.1 s and 13 MB: help, version and render do without.
    from rules.nftables.dataplane import NftablesDataplane  # noqa: PLC0415

    return NftablesDataplane(family)


class Watch(Protocol):
    """Notices that another process touched our rules; readable when there is something to look at."""

    def fileno(self) -> int: ...

    def touched(self) -> bool:
        """Whether our rules may have been changed since the last call."""

    def close(self) -> None: ...


def watch(dataplanes: Sequence[Dataplane]) -> Watch:
    """A watch over the rules of these dataplanes of one mode; what they do themselves is not noticed.

    Raises:
        OSError: the kernel offers none.
    """
    from rules.nftables.dataplane import NftablesDataplane, watch_tables  # noqa: PLC0415  # as above

    return watch_tables(each for each in dataplanes if isinstance(each, NftablesDataplane))


def supported_families(proc: Path = Path("/proc")) -> tuple[Family, ...]:
    """The families that this network namespace can carry (CFG-62)."""
    disabled = proc / "sys/net/ipv6/conf/all/disable_ipv6"
    has_ipv6 = (proc / "net/if_inet6").exists() and disabled.read_text().strip() == "0"
    return (Family.IPV4, Family.IPV6) if has_ipv6 else (Family.IPV4,)
