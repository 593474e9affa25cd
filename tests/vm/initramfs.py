"""A small initramfs, made in memory: busybox, the init script, and the modules that mounting the host's root needs."""

from __future__ import annotations

import lzma
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

MODULES = ("virtio_pci", "virtio_console", "virtio_rng", "9pnet_virtio", "9p", "overlay")
"""What must be there before the host's root is; everything else the guest loads from there."""

_DIRECTORIES = ("bin", "dev", "lower", "modules", "proc", "root", "upper")


class Entry(NamedTuple):
    """A file, a directory or a device of the archive."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def archive(entries: Iterable[Entry]) -> bytes:
    """The entries in the cpio format that the kernel reads ("newc")."""
    return b"".join(_record(number, entry) for number, entry in enumerate([*entries, Entry("TRAILER!!!", 0)], start=1))


def _record(number: int, entry: Entry) -> bytes:
    name = entry.name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    # inode, mode, user, group, links, time, size, device, device of a device file, length of the name, checksum
    fields = (number, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
    return _padded(b"070701" + b"".join(b"%08X" % field for field in fields) + name) + _padded(entry.data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def load_order(names: Iterable[str], dependencies: str, builtin: str) -> list[str]:
    """The files of modules and of all that they need, each after what it needs.

    `dependencies` and `builtin` are the texts of modules.dep and modules.builtin; a module that is built in needs no
    file.

    Raises:
        LookupError: the kernel has no such module.
    """
    needs = {
        _module(file): (file, needed.split())
        for file, _, needed in (line.partition(":") for line in dependencies.splitlines())
    }
    present = {_module(line) for line in builtin.splitlines()}
    order: dict[str, None] = {}
    for name in names:
        if name in present:
            continue
        if name not in needs:
            raise LookupError(f"the kernel has no module {name}")
        file, needed = needs[name]
        # modules.dep lists everything that a module needs, what is needed first at the end.
        order |= dict.fromkeys([*reversed(needed), file])
    return list(order)


def _module(file: str) -> str:
    """The name of the module in a file such as kernel/drivers/virtio/virtio-rng.ko.xz."""
    return file.rpartition("/")[2].partition(".ko")[0].replace("-", "_")


def build(busybox: Path, init: Path, modules: Path) -> bytes:
    """The archive; `modules` is the kernel's directory below lib/modules.

    Raises:
        LookupError: the kernel is without a module that is needed.
        OSError: a file cannot be read.
    """
    files = load_order(MODULES, (modules / "modules.dep").read_text(), (modules / "modules.builtin").read_text())
    return archive(_entries(busybox.read_bytes(), init.read_bytes(), {file: modules / file for file in files}))


def _entries(busybox: bytes, init: bytes, modules: Mapping[str, Path]) -> Iterator[Entry]:
    for name in _DIRECTORIES:
        yield Entry(name, stat.S_IFDIR | 0o755)
    yield Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    yield Entry("bin/busybox", stat.S_IFREG | 0o755, busybox)
    yield Entry("init", stat.S_IFREG | 0o755, init)
    order = []
    for file, path in modules.items():
        data = path.read_bytes()
        if file.endswith(".xz"):
            data = lzma.decompress(data)
        order.append(f"{_module(file)}.ko")
        yield Entry(f"modules/{order[-1]}", stat.S_IFREG | 0o644, data)
    yield Entry("modules/order", stat.S_IFREG | 0o644, "".join(f"{name}\n" for name in order).encode())
