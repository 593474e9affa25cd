"""Kernels from Debian packages, unpacked and not installed, in a cache outside the checkout.

A kernel is asked for by a version's beginning (`6.12`), by the name of a package, or not at all, which is the kernel
of the Debian release that the host runs.  What apt offers now is what is used; where apt cannot be asked, the newest
that the cache has.  The cloud flavour has no 9p, and the others are no stock kernels either.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_STOCK = re.compile(r"linux-image-(?P<release>\d+\.\d+\.[0-9.+~a-z-]*?)-amd64")
_META = "linux-image-amd64"
_PROGRAMS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "depmod": "kmod",
    "setpriv": "util-linux",
    "ip": "iproute2",
    "ps": "procps",
}
_APT = (
    *("apt-get", "-qq", "-o", "Dpkg::Use-Pty=0", "-o", "APT::Sandbox::User=root"),
    # A machine without a network is told from one with a slow one before anybody loses patience.
    *("-o", "Acquire::http::Timeout=30", "-o", "Acquire::https::Timeout=30", "-o", "Acquire::Retries=1"),
)


class KernelError(Exception):
    """A kernel or a program cannot be had; the message says what to do."""


class Kernel(NamedTuple):
    """An unpacked kernel."""

    image: Path
    modules: Path

    @property
    def release(self) -> str:
        return self.modules.name


class Package(NamedTuple):
    name: str
    version: str

    @property
    def key(self) -> str:
        """The name of its directory in the cache."""
        return f"{self.name}_{self.version.replace(':', '%3a')}"


def cache() -> Path:
    """Where kernels are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "sluice", "vm")


def is_stock(name: str) -> bool:
    """Whether a package holds a stock kernel, of no special flavour."""
    match = _STOCK.fullmatch(name)
    return match is not None and not match["release"].endswith(("-cloud", "-rt"))


def numbers(text: str) -> tuple[int, ...]:
    """A version as numbers, to compare kernels by."""
    return tuple(int(each) for each in re.findall(r"\d+", text))


def matching(names: Iterable[str], wanted: str) -> list[str]:
    """The stock kernels among packages whose release begins with a version, the newest first."""
    beginning = numbers(wanted)
    found = [
        name for name in names if is_stock(name) and numbers(name.removesuffix("-amd64"))[: len(beginning)] == beginning
    ]
    return sorted(found, key=lambda name: numbers(name.removesuffix("-amd64")), reverse=True)


def candidate(policy: str) -> str | None:
    """The version that apt would install, from what `apt-cache policy NAME` prints."""
    match = re.search(r"^  Candidate: (\S+)$", policy, re.MULTILINE)
    return match[1] if match and match[1] != "(none)" else None


def install_programs() -> None:
    """Install what is missing of the programs that a machine needs.

    Raises:
        KernelError: it cannot be installed.
    """
    missing = sorted({package for program, package in _PROGRAMS.items() if _which(program) is None})
    if not missing:
        return
    _say(f"from apt: {' '.join(missing)}")
    _update()
    done = _run(*_APT, "install", "-y", "--no-install-recommends", *missing, DEBIAN_FRONTEND="noninteractive")
    if done.returncode != 0:
        raise KernelError(f"cannot install {' '.join(missing)}: {_last_line(done.stderr)}")


def find(wanted: str) -> Kernel:
    """The kernel that is asked for, unpacked in the cache.

    Raises:
        KernelError: it cannot be had.
    """
    package = _choose(wanted)
    if package is None:
        _update()
        package = _choose(wanted)
    kept = _kept(wanted)
    if package is None:
        if not kept:
            raise KernelError(f"apt offers no stock kernel for {wanted or _META}, and the cache has none")
        _say(f"apt cannot be asked: {kept[0].name} from the cache")
        return _kernel(kept[0])
    directory = cache() / package.key
    if not directory.exists():
        try:
            _unpack(package, directory)
        except KernelError as error:
            if not kept:
                raise
            _say(f"{error}: {kept[0].name} from the cache")
            directory = kept[0]
    return _kernel(directory)


def _choose(wanted: str) -> Package | None:
    """What apt offers, as far as its lists know."""
    if wanted and not wanted.startswith("linux-image-"):
        names = matching(_run("apt-cache", "pkgnames", f"linux-image-{wanted}").stdout.split(), wanted)
    else:
        shown = _run("apt-cache", "show", "--no-all-versions", wanted or _META).stdout
        depends = re.search(r"^Depends: (.*)$", shown, re.MULTILINE)
        on = [each.split()[0] for each in depends[1].split(",")] if depends else []
        # A package without a version in its name has a kernel as its dependency.
        names = [wanted] if is_stock(wanted) else [name for name in on if is_stock(name)]
    for name in names:
        if version := candidate(_run("apt-cache", "policy", name).stdout):
            return Package(name, version)
    return None


def _kept(wanted: str) -> list[Path]:
    """What the cache has, the newest first."""
    directories = {path.name.partition("_")[0]: path for path in sorted(cache().glob("linux-image-*_*"))}
    if wanted.startswith("linux-image-"):
        return [path for name, path in directories.items() if name == wanted]
    return [directories[name] for name in matching(directories, wanted)]


def _unpack(package: Package, directory: Path) -> None:
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache(), prefix="unpacking-") as name:
        place = Path(name)
        _say(f"{package.name} {package.version}: download (70 to 110 MB) and unpack into {directory}")
        done = _run(*_APT, "download", f"{package.name}={package.version}", cwd=place)
        if done.returncode != 0:
            # The lists may be older than the archive.
            _update()
            done = _run(*_APT, "download", f"{package.name}={package.version}", cwd=place)
        archives = list(place.glob("*.deb"))
        if done.returncode != 0 or not archives:
            raise KernelError(f"cannot download {package.name}: {_last_line(done.stderr)}")
        unpacked = place / "unpacked"
        done = _run("dpkg", "-x", str(archives[0]), str(unpacked))
        if done.returncode != 0:
            raise KernelError(f"cannot unpack {package.name}: {_last_line(done.stderr)}")
        kernel = _kernel(unpacked)
        done = _run("depmod", "-b", str(kernel.modules.parents[2]), kernel.release)
        if done.returncode != 0:
            raise KernelError(f"depmod: {_last_line(done.stderr)}")
        try:
            unpacked.rename(directory)
        except OSError:
            if not directory.exists():  # else somebody else was faster
                raise


def _kernel(directory: Path) -> Kernel:
    images = list(directory.glob("boot/vmlinuz-*"))
    if len(images) != 1:
        raise KernelError(f"{directory} holds no kernel: remove it")
    release = images[0].name.removeprefix("vmlinuz-")
    modules = [path for top in ("lib", "usr/lib") if (path := directory / top / "modules" / release).is_dir()]
    if not modules:
        raise KernelError(f"{directory} holds no modules: remove it")
    return Kernel(images[0], modules[0])


def _update() -> None:
    _say("apt-get update")
    _run(*_APT, "update")  # a failure shows in what is then not found


def _run(*command: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            cwd=cwd,
            env={**os.environ, "LC_ALL": "C", **environment},
        )
    except FileNotFoundError as error:
        raise KernelError(f"{error.filename} is not there: a Debian host is needed") from None


def which(program: str) -> str:
    """Where a program is that `install_programs` has seen to."""
    found = _which(program)
    if found is None:
        raise KernelError(f"{program} is not there, of Debian's package {_PROGRAMS[program]}")
    return found


def _which(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]


def _say(text: str) -> None:
    print(f"==> {text}", flush=True)
