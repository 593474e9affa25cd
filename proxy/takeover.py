"""kube-proxy's rules on this node: whether a kube-proxy still writes them, and removing them (CFG-52).

Sluice takes a node over in this order: its own rules come first, beside kube-proxy's, which are the same to every
connection; then kube-proxy's go.  Its rules may be wrong, half removed, or of several modes at once: whatever is there
of them goes, and nothing of anybody else.

What mode ipvs has outside of netfilter (virtual servers, a device, sets of addresses) is named, and left, as open
connections go through it; it goes on request, `remove_all`.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from proxy import takeover_ipvs
from rules.dataplane import DataplaneError, UnavailableError
from rules.foreign.removal import NFT_ENTRIES, NFT_TABLE, Removal, removal
from rules.forwarding import Family
from rules.iptables.programs import Programs, RestoreError, available
from rules.netlink.attributes import DecodeError, attributes, text, text_of
from rules.netlink.errors import TransactionError
from rules.netlink.transaction import NetfilterSocket, attributes_of, netfilter_message

PROXY = "kube-proxy"
PORTS = (10256, 10249)
"""Where kube-proxy serves health and metrics.  In a container of its own its process cannot be seen from another one,
but the network namespace of the node is the same."""

_TRIES = 3
"""How often a removal begins anew, as others write rules at the same time."""
_GET_TABLE, _DELETE_TABLE, _GET_CHAIN, _DELETE_CHAIN = 1, 2, 4, 5
_TABLE_NAME, _CHAIN_TABLE, _CHAIN_NAME = 1, 1, 3
_NFT = {Family.IPV4: "ip", Family.IPV6: "ip6"}
_NO_NFTABLES = frozenset({errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT, errno.EINVAL, errno.EOPNOTSUPP})
_LISTENING = "0A"


class RunningError(Exception):
    """A kube-proxy runs, and would write its rules again."""


def take_over(family: Family) -> list[str]:
    """Remove kube-proxy's rules of a family, if it has any and does not run; what was done, a line each.

    Raises:
        RunningError: it runs, and has rules.
        DataplaneError: something could not be removed.
    """
    if not present(family):
        return []
    if running := who_runs():
        raise RunningError(f"{running}: they go once it has ended")
    return [*remove([family]), *takeover_ipvs.left()]


def present(family: Family) -> bool:
    """Whether kube-proxy has rules of a family here, of whatever mode.

    Raises:
        DataplaneError: they cannot be read.
    """
    return _table(family, remove=False) or any(removal(_saved(each)) for each in available(family).values())


def who_runs(proc: Path = Path("/proc"), *, ports: bool = True) -> str:
    """A kube-proxy that runs in this network namespace, in words; empty: none is seen.

    Processes whose namespace cannot be read count, as do strangers at kube-proxy's ports, unless `ports` says that
    those are known to be an agent's of ours.
    """
    own = (proc / "thread-self/ns/net").stat()
    for directory in proc.iterdir():
        if not directory.name.isdecimal() or int(directory.name) == os.getpid():
            continue
        try:
            name = (directory / "comm").read_text(errors="replace")  # a process may call itself anything
            if name.strip() != PROXY or not (directory / "cmdline").read_bytes():
                continue
            if _is_python(directory):
                continue  # ours, under kube-proxy's name
            with contextlib.suppress(PermissionError):
                other = (directory / "ns/net").stat()
                if (other.st_dev, other.st_ino) != (own.st_dev, own.st_ino):
                    continue
        except OSError:
            continue  # it has just ended
        return f"{PROXY} runs in this network namespace (process {directory.name})"
    for port in PORTS if ports else ():
        if _has_stranger(port, proc):
            return f"another program listens on port {port}, as a running {PROXY} does"
    return ""


def remove(families: Iterable[Family] = tuple(Family)) -> Iterator[str]:
    """Remove kube-proxy's rules, whatever mode they are of, and say what was removed and what had to stay.

    Raises:
        DataplaneError: something could not be removed; what was said before is gone.
    """
    failures: dict[str, None] = {}
    for family in families:
        try:
            if _table(family, remove=True):
                yield f"removed {PROXY}'s nftables rules for {family.label}: the table {_NFT[family]} {NFT_TABLE}"
        except DataplaneError as error:
            failures[str(error)] = None
        for backend, programs in available(family).items():
            try:
                removed = _remove_iptables(programs)
            except DataplaneError as error:
                failures[str(error)] = None
                continue
            if removed:
                yield f"removed {PROXY}'s iptables-{backend} rules for {family.label}: {removed}"
            yield from removed.kept
    if failures:
        raise DataplaneError("; ".join(failures))


def remove_all() -> Iterator[str]:
    """Remove all that any of kube-proxy's modes has left, and say what was removed and what had to stay.

    Raises:
        DataplaneError: something could not be removed; what was said before is gone.
    """
    failures: dict[str, None] = {}
    for part in (takeover_ipvs.remove_servers, remove, takeover_ipvs.remove_sets):
        try:
            yield from part()
        except DataplaneError as error:
            failures[str(error)] = None
    if failures:
        raise DataplaneError("; ".join(failures))


def _saved(programs: Programs) -> str:
    """The rules that the kernel holds for these programs; none where it can do nothing with them."""
    try:
        return programs.saved()
    except UnavailableError:
        if os.geteuid() != 0:
            raise  # who may not look cannot know
        return ""


def _remove_iptables(programs: Programs) -> Removal:
    for last in (*[False] * (_TRIES - 1), True):
        wanted = removal(_saved(programs))
        try:
            for step in wanted.steps if wanted else ():
                programs.apply(step)
        except RestoreError as error:
            if last or not error.ours:
                raise
            continue
        return wanted
    raise AssertionError("the last try returns or raises")


def _table(family: Family, *, remove: bool) -> bool:
    """Whether the table of nftables mode is there, or was until it was removed.

    Raises:
        DataplaneError: the kernel refused.
    """
    try:
        with NetfilterSocket() as socket:
            there = (NFT_TABLE,) in _names(socket, family, _GET_TABLE, _TABLE_NAME)
            if there and remove:
                chains = _names(socket, family, _GET_CHAIN, _CHAIN_TABLE, _CHAIN_NAME)
                socket.commit(
                    [
                        _request(family, _DELETE_CHAIN, text(_CHAIN_TABLE, NFT_TABLE) + text(_CHAIN_NAME, name))
                        for name in NFT_ENTRIES
                        if (NFT_TABLE, name) in chains
                    ]
                )
                socket.commit([_request(family, _DELETE_TABLE, text(_TABLE_NAME, NFT_TABLE))])
            return there
    except (OSError, DecodeError, TransactionError) as error:
        if isinstance(error, OSError) and error.errno in _NO_NFTABLES:
            return False
        raise DataplaneError(f"{PROXY}'s table of nftables for {family.label}: {error}") from error


def _request(family: Family, kind: int, content: bytes = b"") -> bytes:
    return netfilter_message(kind, 0, family.af, content)


def _names(socket: NetfilterSocket, family: Family, kind: int, *which: int) -> list[tuple[str, ...]]:
    found = []
    for payload in socket.dump(_request(family, kind)):
        values = attributes(attributes_of(payload))
        found.append(tuple(text_of(values, each) for each in which))
    return found


def _is_python(directory: Path) -> bool:
    try:
        return (directory / "exe").readlink().name.startswith("python")
    except PermissionError:
        return False


def _has_stranger(port: int, proc: Path) -> bool:
    """Whether a process other than this one listens on a TCP port of this network namespace."""
    listeners = set()
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (proc / "thread-self/net" / name).read_text().splitlines()[1:]:
                words = line.split()
                if words[3] == _LISTENING and int(words[1].rpartition(":")[2], 16) == port:
                    listeners.add(f"socket:[{words[9]}]")
    if not listeners:
        return False
    own = set()
    for each in (proc / "self/fd").iterdir():
        with contextlib.suppress(OSError):
            own.add(str(each.readlink()))
    return not listeners <= own
