"""Kernel settings under /proc/sys that some behaviour needs, in the network namespace of the calling thread.

A setting is written only where it differs, so that an agent without the privilege runs in silence behind an init
container that had it (CFG-53).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path("/proc/sys")

ROUTE_LOCALNET = "net/ipv4/conf/all/route_localnet"
"""Lets packets with a loopback address leave by other interfaces: loopback node ports need it (IPT-30)."""


class Setting(NamedTuple):
    """A file that holds a number, and the number that it should hold."""

    path: Path
    value: int
    at_least: bool = False
    """Whether a larger number is as good."""

    @property
    def name(self) -> str:
        """The name by which sysctl(8) knows it; for others the path."""
        parts = self.path.as_posix().partition("/proc/sys/")
        return parts[2].replace("/", ".") if parts[1] else self.path.as_posix()


def sysctl(name: str, value: int) -> Setting:
    """A setting by its path under /proc/sys."""
    return Setting(ROOT / name, value)


def ensure(name: str, value: int, *, root: Path = ROOT) -> str | None:
    """Set a sysctl where it has another value; why it could not be set, in one line, or None."""
    return next(iter(ensure_all([Setting(root / name, value)])), None)


def ensure_all(settings: Iterable[Setting]) -> list[str]:
    """Make every file hold its number; what could not be written, one line for each reason."""
    failed: dict[str, list[str]] = {}
    for setting in settings:
        try:
            _ensure(setting)
        except (OSError, ValueError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            failed.setdefault(reason, []).append(f"{setting.name} to {setting.value}")
    return [f"cannot set {', '.join(names)}: {reason}" for reason, names in failed.items()]


def _ensure(setting: Setting) -> None:
    found = int(setting.path.read_text())
    if found != setting.value and not (setting.at_least and found > setting.value):
        setting.path.write_text(f"{setting.value}\n")
