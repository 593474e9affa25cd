"""Kernel settings under /proc/sys that some behaviour needs, in the network namespace of the calling thread."""

from __future__ import annotations

from pathlib import Path

ROUTE_LOCALNET = "net/ipv4/conf/all/route_localnet"
"""Lets packets with a loopback address leave by other interfaces: loopback node ports need it (IPT-30)."""


def ensure(name: str, value: int, *, root: Path = Path("/proc/sys")) -> str | None:
    """Set a sysctl where it has another value; why it could not be set, in one line, or None."""
    path = root / name
    try:
        if path.read_text().strip() == str(value):
            return None
        path.write_text(f"{value}\n")
    except OSError as error:
        return f"sysctl {name.replace('/', '.')} cannot be set to {value}: {error.strerror}"
    return None
