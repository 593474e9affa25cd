"""`sluice bundle`: one archive for a bug report, which `dump`, `explain` and `verify` read with `-f`.

    manifest.json        what is in it, and what could not be had and why
    status.json          what the agent says of itself
    objects.json         Services, slices, the Node and ServiceCIDRs as the agent knows them, as a List
    tables.json          the wanted tables and the kernel's, exactly (see `proxy.bundle_reading`)
    wanted.txt, held.txt the same for people
    rules-*.txt          the kernel's own rules and elements, as `sluice dump -o raw`
    configuration.json   the effective configuration, and the agent's command line
    kernel.json          release, sysctls that matter, modules, others' chains
    log.txt              the end of the journal of the unit

What could be a secret is taken out, and files that hold credentials are never read: a kubeconfig is a path here.  A
file that grows beyond `LONGEST` is left out, or cut where it is text.
"""

from __future__ import annotations

import contextlib
import io
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from proxy import agent_socket, modes
from proxy.agent_socket import AgentError
from proxy.bundle_reading import FORMAT, LONGEST, TOP, Entry, Manifest, Missing, SavedTable
from proxy.dump import Filter, raw_lines
from proxy.explain.surroundings import Surroundings, look
from proxy.output import Shown, write
from proxy.report import Status
from rules.dataplane import Capabilities, DataplaneError
from rules.forwarding import Family, ForwardingTable, format_address

LOG_LINES = 5000
UNIT = "sluice"

T = TypeVar("T")

_SYSCTLS = (
    "net/ipv4/ip_forward",
    "net/ipv4/ip_local_port_range",
    "net/ipv4/ip_local_reserved_ports",
    "net/ipv4/conf/all/rp_filter",
    "net/ipv4/conf/all/route_localnet",
    "net/ipv4/conf/default/rp_filter",
    "net/ipv6/conf/all/forwarding",
    "net/ipv6/conf/all/disable_ipv6",
    "net/bridge/bridge-nf-call-iptables",
    "net/bridge/bridge-nf-call-ip6tables",
    "net/netfilter/nf_conntrack_count",
    "net/netfilter/nf_conntrack_max",
    "net/netfilter/nf_conntrack_tcp_be_liberal",
    "net/netfilter/nf_conntrack_tcp_timeout_established",
    "net/netfilter/nf_conntrack_udp_timeout",
    "kernel/unprivileged_bpf_disabled",
    "user/max_net_namespaces",
)
_MODULES = ("nf", "nft", "ip", "ip6", "xt", "x_tables", "br_netfilter", "dummy")


# --- secrets -----------------------------------------------------------------------------------------------------

_REMOVED = "[removed]"
_SECRETS = (
    (re.compile(r"-----BEGIN [A-Z0-9 ]+-----.*?(-----END [A-Z0-9 ]+-----|\Z)", re.DOTALL), _REMOVED),
    (re.compile(r"\beyJ[\w-]+\.[\w-]+(\.[\w-]*)?"), _REMOVED),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{6,}"), rf"\1 {_REMOVED}"),
    (re.compile(r"(?<=://)[^/\s@\"']+@"), f"{_REMOVED}@"),
    (
        re.compile(
            r"(?i)([\w.-]*(?:token|password|passwd|secret|client-key-data|client-certificate-data|api[_-]?key)"
            r"[\w.-]*[\"']?\s*[=:]\s*)(\"(?:[^\"\\]|\\.)*\"|'[^']*'|[^\s,;}\]]+)"
        ),
        rf'\1"{_REMOVED}"',
    ),
    (re.compile(r"(?i)(--?[\w-]*(?:token|password|secret)[\w-]*[\"',\s]+)[^\s\"',]+"), rf"\1{_REMOVED}"),
    (re.compile(r"\bLS0tLS1CRUdJTi[\w+/=]+"), _REMOVED),
)
"""PEM, JWT, HTTP authentication, users in URLs, fields and flags by their names, PEM in base 64."""


def without_secrets(text: str) -> str:
    """The text, with what could be a secret taken out."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text


# --- making ------------------------------------------------------------------------------------------------------


class _Archive:
    """Files as they are put together, and what is missing."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[bytes, bool]] = {}
        self.missing: list[Missing] = []

    def lack(self, name: str, why: object) -> None:
        self.missing.append(Missing(name=name, why=without_secrets(" ".join(str(why).split()))))

    def text(self, name: str, text: str) -> None:
        """A file of which the end is what matters most."""
        data = text.encode(errors="replace")
        self.files[name] = data[-LONGEST:], len(data) > LONGEST

    def json(self, name: str, value: Any, *, clean: bool = True) -> None:
        """A file that is whole or not there at all, its texts without secrets unless it can hold none."""
        plain = msgspec.to_builtins(value)
        data = msgspec.json.format(msgspec.json.encode(_clean(plain) if clean else plain))
        if len(data) > LONGEST:
            self.lack(name, f"it is {len(data)} bytes long, and {LONGEST} are the most")
        else:
            self.files[name] = data, False

    def ask(self, name: str, question: Callable[[], T]) -> T | None:
        """An answer; None, and the reason noted, where there is none."""
        try:
            return question()
        except (AgentError, DataplaneError, OSError, ValueError) as error:
            self.lack(name, error)
            return None


def _clean(value: Any) -> Any:
    """Plain values, each text without secrets, and none where its field's name tells one."""
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, dict):
        return {
            key: _REMOVED if isinstance(item, str) and item and _TELLS.search(str(key)) else _clean(item)
            for key, item in value.items()
        }
    return [_clean(item) for item in value] if isinstance(value, list) else value


_TELLS = re.compile(r"(?i)token|password|passwd|secret|(client-)?key-data|certificate-data|api[_-]?key")


def main(output: str, run_directory: str, configuration: Callable[[], Any], *, now: float | None = None) -> int:
    """Write an archive and say where; 0, or 2 if it cannot be written.

    Args:
        output: the file, which must not be there yet; empty: one in the working directory, named by node and time.
        run_directory: the agent's.
        configuration: gives the effective configuration as plain values.
        now: seconds since the epoch; by default the clock's.
    """
    moment = time.gmtime(time.time() if now is None else now)
    archive, manifest = gather(run_directory, configuration, time.strftime("%Y-%m-%dT%H:%M:%SZ", moment))
    path = output or f"sluice-bundle-{manifest.node}-{time.strftime('%Y%m%dT%H%M%SZ', moment)}.tar.gz"
    try:
        _write(path, archive)
    except OSError as error:
        sys.stderr.write(f"sluice bundle: {path}: {error.strerror or error}\n")
        return 2
    for each in manifest.missing:
        sys.stderr.write(f"sluice bundle: without {each.name}: {each.why}\n")
    sys.stdout.write(f"{path}\n")
    return 0


def gather(run_directory: str, configuration: Callable[[], Any], taken: str) -> tuple[dict[str, bytes], Manifest]:
    """All files of an archive by name, and its manifest, which is one of them."""
    archive = _Archive()
    status = archive.ask("status.json", lambda: agent_socket.status(run_directory))
    tables: list[SavedTable] = []
    if status is not None:
        archive.json("status.json", status)
        tables += _wanted(archive, status, run_directory)
        _objects(archive, run_directory)
    tables += _held(archive)
    # Addresses, numbers and names of Services: a Service may be called token and have a port.
    archive.json("tables.json", tables, clean=False)
    for whose in ("wanted", "held"):
        out = io.StringIO()
        write([Shown(each.dataplane, each.table) for each in tables if each.whose == whose], "wide", out)
        archive.text(f"{whose}.txt", out.getvalue())
    settings = archive.ask("configuration.json", configuration)
    archive.json("configuration.json", {"effective": settings, "agent": _command_line(status)})
    node = _kernel(archive)
    _log(archive)
    manifest = Manifest(
        format=FORMAT,
        version=metadata.version("sluice-proxy"),
        taken=taken,
        node=status.node if status is not None else platform.node(),
        addresses=tuple(sorted(node.addresses)),
        node_ips=tuple(node.node_ips.values()),
        files=tuple(Entry(name=name, bytes=len(data), cut=cut) for name, (data, cut) in sorted(archive.files.items())),
        missing=tuple(archive.missing),
    )
    data = msgspec.json.format(msgspec.json.encode(manifest))
    return {"manifest.json": data, **{name: data for name, (data, _) in sorted(archive.files.items())}}, manifest


def _wanted(archive: _Archive, status: Status, run_directory: str) -> Iterator[SavedTable]:
    labels = {family.label: family for family in Family}
    for each in status.families:
        family = labels[each.family]
        found = archive.ask(f"wanted {each.family}", lambda family=family: agent_socket.table(family, run_directory))  # type: ignore[misc]
        if found is not None:
            yield _saved("wanted", found.head.dataplane, found.table, found.head.capabilities)


def _held(archive: _Archive) -> Iterator[SavedTable]:
    """The kernel's tables; its rules become files on the way."""
    for name in modes.present():
        for family in Family:
            try:
                dataplane = modes.open_dataplane(name, family)
                try:
                    raw, capabilities = dataplane.raw(), dataplane.capabilities
                finally:
                    dataplane.close()
            except DataplaneError as error:
                archive.lack(f"held {family.label} in {name}", error)
                continue
            if raw is not None:
                lines = "".join(f"{line}\n" for line in raw_lines(raw, Filter()))
                archive.text(f"rules-{name}-{family.label}.txt", lines)
                yield _saved("held", name, raw.table, capabilities)


def _saved(whose: str, dataplane: str, table: ForwardingTable, capabilities: Capabilities) -> SavedTable:
    return SavedTable(
        whose=whose,
        dataplane=dataplane,
        family=table.family,
        node=table.node,
        capabilities=capabilities,
        routes=tuple(table.routes.items()),
        hairpins=tuple(sorted(table.hairpins)),
        damage=tuple(sorted(table.damage)),
    )


def _objects(archive: _Archive, run_directory: str) -> None:
    objects = archive.ask("objects.json", lambda: agent_socket.objects("", run_directory))
    if objects is None:
        return
    for each in objects:
        # Controllers keep what they like there, and nothing of a Node's is read.
        if each.get("kind") == "Node":
            each.get("metadata", {}).pop("annotations", None)
    archive.json("objects.json", {"apiVersion": "v1", "kind": "List", "items": objects})


def _command_line(status: Status | None) -> list[str]:
    """How the agent was started; a flag and its value are looked at together."""
    words = _words_of(status.pid) if status is not None else []
    return without_secrets("\n".join(words)).split("\n") if words else []


def _words_of(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")[:-1]
    return []


def _kernel(archive: _Archive) -> Surroundings:
    """The kernel's facts; the node around our rules."""

    def text(path: str) -> str:
        with contextlib.suppress(OSError):
            return Path(path).read_text(errors="replace").strip()
        return ""

    modules = [line.split()[0] for line in text("/proc/modules").splitlines()]
    node = archive.ask("surroundings", look) or Surroundings()
    facts = {
        "uname": platform.uname()._asdict(),
        "os": text("/etc/os-release").splitlines(),
        "python": platform.python_version(),
        "sysctls": {name.replace("/", "."): text(f"/proc/sys/{name}") or None for name in _SYSCTLS},
        "modules": sorted(each for each in modules if each.startswith(_MODULES)),
        "addresses": sorted(map(format_address, node.addresses)),
        "chains": sorted(map(str, node.chains)),
        "otherProxies": node.other_proxies,
    }
    archive.json("kernel.json", facts)
    return node


def _log(archive: _Archive) -> None:
    program = shutil.which("journalctl")
    if program is None:
        archive.lack("log.txt", "there is no journalctl here; in a pod, kubectl logs has the log")
        return
    command = [program, "--no-pager", "-u", UNIT, "-n", str(LOG_LINES), "-o", "short-iso"]
    try:
        done = subprocess.run(command, capture_output=True, check=True, timeout=30)  # noqa: S603  # found by name
    except (OSError, subprocess.SubprocessError) as error:
        archive.lack("log.txt", error)
        return
    archive.text("log.txt", without_secrets(done.stdout.decode(errors="replace")))


def _write(path: str, files: dict[str, bytes]) -> None:
    """Write an archive that nobody else may read; there is none if that fails."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(handle, "wb") as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
            for name, data in files.items():
                info = tarfile.TarInfo(f"{TOP}/{name}")
                info.size, info.mode = len(data), 0o600
                archive.addfile(info, io.BytesIO(data))
    except BaseException:
        Path(path).unlink(missing_ok=True)
        raise
