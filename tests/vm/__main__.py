"""Run a command on another kernel: `python -m tests.vm [OPTION...] [--] COMMAND ARGUMENT...`; see README.md.

It uses the standard library only, so that any Python 3.11 runs it.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from tests.vm import initramfs, kernels, machine
from tests.vm.kernels import Kernel, KernelError
from tests.vm.machine import Machine

_HERE = Path(__file__).parent
_PROBE_SECONDS = 10.0
_NOTICE = 20.0
"""Seconds before its end in which a guest that hangs is asked what it is at."""
_COMPILED = ("proxy", "rules", "tests")
"""Packages whose bytecode is made here: an emulated processor takes ten times longer, and forgets it every time."""
_WRITTEN = ("command", "console.log", "exit", "guest", "junit.xml", "settings", "started")
"""What a run leaves in the results' directory, the command's own files aside."""
_PASSED_ON = ("TERM", "SLUICE_TEST_MODE", "HYPOTHESIS_PROFILE", "PYTEST_ADDOPTS")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; the command's exit code, or 2, 124, 125 or 130 when the machine came to nothing."""
    options = _options(arguments)
    try:
        return _run(options)
    except (KernelError, LookupError) as error:
        left_out = "nothing was run: " if options.if_available else ""
        print(f"vm: {left_out}{error}", file=sys.stderr)
        return 0 if options.if_available else 2
    except KeyboardInterrupt:
        print("\nvm: interrupted", file=sys.stderr)
        return machine.INTERRUPTED


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.vm", description="Run a command on another kernel.")
    parser.add_argument("--kernel", default="", help="6.12, or a package; default: the kernel of the host's Debian")
    parser.add_argument("--accel", choices=("auto", "kvm", "tcg"), default="auto", help="default: kvm where it works")
    parser.add_argument("--deadline", type=float, default=900.0, help="seconds; default 900")
    parser.add_argument("--memory", type=int, default=2048, help="MB; default 2048")
    parser.add_argument("--processors", type=int, default=1, help="default 1")
    parser.add_argument("--results", type=Path, help="where exit code, console and junit go; default .vm/RELEASE")
    parser.add_argument(
        "--if-available", action="store_true", help="where kernel or programs cannot be had, say so and exit with 0"
    )
    parser.add_argument("--shell", action="store_true", help="a terminal instead of a command, without a deadline")
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, help="what to run, in this directory; `{results}` is the results' place"
    )
    options = parser.parse_args(arguments)
    if bool(options.command) == options.shell:
        parser.error("a command, or --shell")
    return options


def _run(options: argparse.Namespace) -> int:
    kernels.install_programs()
    kernel = kernels.find(options.kernel)
    for package in _COMPILED:
        compileall.compile_dir(package, quiet=2)
    results = (options.results or Path(".vm", kernel.release)).resolve()
    results.mkdir(parents=True, exist_ok=True)
    for name in _WRITTEN:
        (results / name).unlink(missing_ok=True)
    with tempfile.NamedTemporaryFile(prefix="sluice-vm-", suffix=".cpio") as file:
        file.write(initramfs.build(Path(kernels.which("busybox")), _HERE / "init", kernel.modules))
        file.flush()
        plan = Machine(
            qemu=kernels.which("qemu-system-x86_64"),
            image=kernel.image,
            initramfs=Path(file.name),
            console=results / "console.log",
            share=results,
            terminal=options.shell,
            memory=options.memory,
            processors=options.processors,
        )
        accelerator = _accelerator(plan) if options.accel == "auto" else options.accel
        plan = plan._replace(accelerator=accelerator)
        _fill(results, kernel, options)
        print(f"==> Linux {kernel.release} in QEMU ({accelerator})", flush=True)
        began = time.time()
        timed_out = _boot(plan, None if options.shell else options.deadline)
    ended = machine.verdict(_read(results / "exit"), _read(plan.console) or "", timed_out=timed_out)
    _report(ended, results, kernel, time.time() - began, began)
    return ended.code


def _fill(results: Path, kernel: Kernel, options: argparse.Namespace) -> None:
    """Put what the guest needs into the directory that it shares with us."""
    inside = "/run/sluice-vm"
    if options.shell:
        size = shutil.get_terminal_size()
        command = ["sh", "-c", f"stty rows {size.lines} cols {size.columns}; exec bash"]
    else:
        command = [each.replace("{results}", inside) for each in options.command]
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    environment |= {
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "TMPDIR": "/run/tmp",
        "PYTHONUNBUFFERED": "1",
        "SLUICE_TIME_SCALE": os.environ.get("SLUICE_TIME_SCALE", "5"),
    }
    shutil.copyfile(_HERE / "guest", results / "guest")
    (results / "settings").write_text(machine.settings(kernel.modules, options.deadline - _NOTICE))
    (results / "command").write_text(machine.script(command, Path.cwd(), environment))


def _accelerator(plan: Machine) -> str:
    """What to run on: KVM where a guest really comes up with it.  A probe that failed is not made again until reboot.

    A /dev/kvm says little: nested or restricted, it may hang or stop at the first instructions of a stock kernel.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    boot = (_read(Path("/proc/sys/kernel/random/boot_id")) or "").strip()
    known = kernels.cache() / "no-kvm-since"
    if _read(known) == boot:
        return "tcg"
    with tempfile.TemporaryDirectory(prefix="sluice-vm-") as place:
        console = Path(place, "console.log")
        _boot(plan._replace(accelerator="kvm", share=None, terminal=False, console=console), _PROBE_SECONDS, quiet=True)
        if "sluice-vm: probe" in (_read(console) or ""):
            return "kvm"
    known.write_text(boot)
    return "tcg"


def _boot(plan: Machine, deadline: float | None, *, quiet: bool = False) -> bool:
    """Run a machine to its end; whether that was the deadline.  No process is left, however this ends."""
    # Whoever kills this process outright takes the machine with it.
    command = [kernels.which("setpriv"), "--pdeathsig", "KILL", *plan.command()]
    with _terminal_kept(), _signals_raise():
        # A pipe that nobody writes to: at the end of its input QEMU would take the output for closed too.
        machine_input = None if plan.terminal else subprocess.PIPE
        errors = subprocess.DEVNULL if quiet else None
        process = subprocess.Popen(
            command, stdin=machine_input, stderr=errors, process_group=None if plan.terminal else 0
        )
        try:
            process.wait(deadline)
        except subprocess.TimeoutExpired:
            return True
        finally:
            process.kill()
            process.communicate()
    return False


@contextlib.contextmanager
def _terminal_kept() -> Iterator[None]:
    """Leave the terminal as it was: a QEMU that was killed does not."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Take SIGTERM and SIGHUP as ^C is taken."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _report(ended: machine.Verdict, results: Path, kernel: Kernel, seconds: float, began: float) -> None:
    started = results / "started"
    boot = f", {started.stat().st_mtime - began:.0f} s of them until the command began" if started.exists() else ""
    if ended.trouble:
        print(f"vm: {ended.trouble}; the end of its console:", file=sys.stderr)
        print(machine.tail(_read(results / "console.log") or "", 60), file=sys.stderr)
    found = machine.counts(_read(results / "junit.xml") or "")
    tests = f": {found}" if found else ""
    print(f"==> Linux {kernel.release}{tests} in {seconds:.0f} s{boot}; console and results in {results}", flush=True)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
