"""The virtual machine as QEMU is told to make it, and what to think of how it ended.  Pure."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree as ET

TIMED_OUT = 124
"""The exit code of a machine that was killed at its deadline, as of timeout(1)."""
BROKEN = 125
"""That of a machine that ended without saying how the command did."""
INTERRUPTED = 130

# Emulated, a guest feels every trap and every wait for other processors.
_KERNEL_ARGUMENTS = (
    "console=ttyS0",
    "quiet",
    "panic=-1",  # with -no-reboot: a panic ends the machine
    "mitigations=off",
    "rcupdate.rcu_expedited=1",
    "tsc=reliable",
    "no_timer_check",
    "nowatchdog",
    "audit=0",
    "random.trust_cpu=on",
)


class Machine(NamedTuple):
    """A machine to be started."""

    qemu: str
    image: Path
    initramfs: Path
    console: Path
    """The file that gets all that the kernel prints."""
    share: Path | None = None
    """The directory that the guest may write to; None: it boots no further than its initramfs."""
    accelerator: str = "tcg"
    terminal: bool = False
    """Standard input and output are the guest's terminal; otherwise its command's output, no input."""
    memory: int = 2048
    """MB."""
    processors: int = 1

    def command(self) -> list[str]:
        """The command line."""
        tcg = self.accelerator == "tcg"
        line = [
            self.qemu,
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-machine", "q35"),
            *("-accel", "tcg,tb-size=512" if tcg else self.accelerator),
            # An old processor: newer ones have what costs an emulator more than it brings (AVX, SMAP, 5-level tables).
            *("-cpu", "Nehalem" if tcg else "host"),
            *("-smp", str(self.processors), "-m", str(self.memory)),
            *("-kernel", str(self.image), "-initrd", str(self.initramfs)),
            *("-append", " ".join([*_KERNEL_ARGUMENTS, *(() if self.share else ("sluice.probe",))])),
            *("-chardev", f"file,id=console,path={_escaped(self.console)}", "-serial", "chardev:console"),
        ]
        if self.share is None:
            return line
        port = "virtconsole" if self.terminal else "virtserialport"
        return [
            *line,
            *("-device", "virtio-rng-pci", "-device", "virtio-serial-pci"),
            *("-chardev", "stdio,id=terminal,signal=off", "-device", f"{port},chardev=terminal"),
            *("-virtfs", "local,path=/,mount_tag=host,security_model=passthrough,readonly=on,multidevs=remap"),
            *("-virtfs", f"local,path={_escaped(self.share)},mount_tag=share,security_model=none,multidevs=remap"),
        ]


def _escaped(path: Path) -> str:
    """A path as the value of a QEMU option."""
    return str(path).replace(",", ",,")


def settings(modules: Path, patience: float) -> str:
    """What the guest's first script has to know, as shell; `patience` is after how many seconds it shows what runs."""
    return f"MODULES={shlex.quote(str(modules))}\nPATIENCE={max(1, round(patience))}\n"


def script(command: Sequence[str], directory: Path, environment: Mapping[str, str]) -> str:
    """The command as a shell script: in a directory, with variables."""
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    return "\n".join([*exports, f"cd {shlex.quote(str(directory))} || exit 126", f"exec {shlex.join(command)}", ""])


class Verdict(NamedTuple):
    """How a machine ended."""

    code: int
    """To exit with: the command's own, or one of this module's."""
    trouble: str = ""
    """What went wrong with the machine itself; empty when it ran the command to its end."""


def verdict(exit_file: str | None, console: str, *, timed_out: bool) -> Verdict:
    """How a machine ended, from the file with the command's exit code and from its console."""
    if exit_file is not None and exit_file.strip().isdecimal():
        return Verdict(int(exit_file))
    if timed_out:
        return Verdict(TIMED_OUT, "it was killed at its deadline")
    for line in console.splitlines():
        if "sluice-vm: " in line or "Kernel panic" in line:
            return Verdict(BROKEN, line.strip())
    return Verdict(BROKEN, "it ended without the command's exit code")


class Counts(NamedTuple):
    """What a junit file says."""

    passed: int
    failed: int
    skipped: int

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


def counts(junit: str) -> Counts | None:
    """The sums of a junit file; None: it is cut short, or none."""
    try:
        suites = list(ET.fromstring(junit).iter("testsuite"))

        def total(name: str) -> int:
            return sum(int(suite.get(name, 0)) for suite in suites)

        failed = total("failures") + total("errors")
        return Counts(total("tests") - failed - total("skipped"), failed, total("skipped"))
    except (ET.ParseError, ValueError):
        return None


def tail(text: str, lines: int) -> str:
    """The last lines of what a terminal got."""
    return "\n".join(text.replace("\r", "").splitlines()[-lines:])
