"""`sluice bundle`: one archive for a bug report, which the verbs that ask a node read with `-f`.

    manifest.json        what is in it, and what could not be had and why
    status.json          what the agent says of itself
    objects.json         Services, slices, the Node and ServiceCIDRs as the agent knows them, as a List
    tables.json          the wanted tables and the kernel's, exactly (see `proxy.bundle.reading`)
    wanted.txt, held.txt the same for people
    rules-*.txt          the kernel's own rules and elements, as `sluice dump -o raw`
    configuration.json   the effective configuration, and the agent's command line
    others-*.txt         rules of others as iptables-save and nft print them
    surroundings.json    the node beside our rules: addresses, forwarding, others' chains
    flows.json           the flows through Services
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
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from proxy import agent_socket, flows, modes
from proxy.agent_socket import AgentError
from proxy.bundle.reading import (
    FORMAT,
    LONGEST,
    OTHERS,
    TOP,
    Entry,
    Manifest,
    Missing,
    SavedFlow,
    SavedFlows,
    SavedTable,
)
from proxy.bundle.secrets import cleaned, without_secrets
from proxy.doctor.verb import in_doubt, lacking_of
from proxy.dump import Filter, Open, raw_lines
from proxy.explain.gather import Means
from proxy.explain.obstacles import backends_of
from proxy.explain.surroundings import OUR_TABLE, Surroundings, look
from proxy.foreign import ipvs
from proxy.output import Shown, write
from proxy.report import Status
from rules.dataplane import Capabilities, DataplaneError
from rules.forwarding import Address, Family, ForwardingTable, format_address
from rules.iptables.programs import available
from rules.iptables.text import PREFIX

LOG_LINES = 5000
MOST_FLOWS = 20_000
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

    def whole(self, name: str, text: str) -> None:
        """A text that is there from its beginning to its end, or not at all."""
        data = text.encode(errors="replace")
        if len(data) > LONGEST:
            self.lack(name, f"it is {len(data)} bytes long, and {LONGEST} are the most")
        else:
            self.files[name] = data, False

    def json(self, name: str, value: Any, *, clean: bool = True) -> None:
        """A file that is whole or not there at all, its texts without secrets unless it can hold none."""
        plain = msgspec.to_builtins(value)
        data = msgspec.json.format(msgspec.json.encode(cleaned(plain) if clean else plain))
        self.whole(name, data.decode())

    def ask(self, name: str, question: Callable[[], T]) -> T | None:
        """An answer; None, and the reason noted, where there is none."""
        try:
            return question()
        except (AgentError, DataplaneError, OSError, ValueError, subprocess.SubprocessError) as error:
            self.lack(name, error)
            return None


def main(
    output: str,
    run_directory: str,
    configuration: Callable[[], Any],
    *,
    open_dataplane: Open | None = None,
    now: float | None = None,
) -> int:
    """Write an archive and say where; 0, or 2 if it cannot be written.

    Args:
        output: the file, which must not be there yet; empty: one in the working directory, named by node and time.
        run_directory: the agent's.
        configuration: gives the effective configuration as plain values.
        open_dataplane: how the node's rules are read; None: without any configuration.
        now: seconds since the epoch; by default the clock's.
    """
    moment = time.gmtime(time.time() if now is None else now)
    opener = open_dataplane or modes.open_dataplane
    archive, manifest = gather(run_directory, configuration, opener, time.strftime("%Y-%m-%dT%H:%M:%SZ", moment))
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


def gather(
    run_directory: str, configuration: Callable[[], Any], open_dataplane: Open, taken: str
) -> tuple[dict[str, bytes], Manifest]:
    """All files of an archive by name, and its manifest, which is one of them."""
    archive = _Archive()
    status = archive.ask("status.json", lambda: agent_socket.status(run_directory))
    tables: list[SavedTable] = []
    if status is not None:
        archive.json("status.json", status)
        tables += _wanted(archive, status, run_directory)
        _objects(archive, run_directory)
    tables += _held(archive, open_dataplane)
    # Addresses, numbers and names of Services: a Service may be called token and have a port.
    archive.json("tables.json", tables, clean=False)
    for whose in ("wanted", "held"):
        out = io.StringIO()
        write([Shown(each.dataplane, each.table) for each in tables if each.whose == whose], "wide", out)
        archive.text(f"{whose}.txt", out.getvalue())
    settings = archive.ask("configuration.json", configuration)
    archive.json("configuration.json", {"effective": settings, "agent": _command_line(status)})
    node = _kernel(archive, backends_of(route for each in tables for _, route in each.routes))
    archive.json("surroundings.json", node)
    _flows(archive, run_directory, open_dataplane)
    _others(archive)
    _log(archive)
    manifest = Manifest(
        format=FORMAT,
        version=metadata.version("sluice-proxy"),
        taken=taken,
        node=status.node if status is not None else platform.node(),
        addresses=tuple(sorted(node.addresses)),
        node_ips=tuple(node.node_ips.values()),
        lacking=_lacking(status, open_dataplane),
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


def _held(archive: _Archive, open_dataplane: Open) -> Iterator[SavedTable]:
    """The kernel's tables; its rules become files on the way."""
    for name in modes.present():
        for family in Family:
            try:
                dataplane = open_dataplane(name, family)
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


def _kernel(archive: _Archive, backends: Iterable[Address]) -> Surroundings:
    """The kernel's facts; the node around our rules, and its ways to backends."""

    def text(path: str) -> str:
        with contextlib.suppress(OSError):
            return Path(path).read_text(errors="replace").strip()
        return ""

    modules = [line.split()[0] for line in text("/proc/modules").splitlines()]
    node = archive.ask("surroundings", lambda: look(*backends)) or Surroundings()
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


def _lacking(status: Status | None, open_dataplane: Open) -> tuple[str, ...]:
    """What the kernel does not have that the agent's mode needs."""
    return tuple(lacking_of(in_doubt(status), Means(open_dataplane))) if status is not None else ()


def _flows(archive: _Archive, run_directory: str, open_dataplane: Open) -> None:
    """The flows through Services; of very many the stale ones first."""
    report = archive.ask("flows.json", lambda: flows.look(run_directory=run_directory, open_dataplane=open_dataplane))
    if report is None:
        return
    for problem in report.problems:
        archive.lack("flows.json", problem)
    found = sorted(report.flows, key=lambda each: not each.stale)
    saved = tuple(
        SavedFlow(
            family=each.family,
            service=each.service,
            flow=each.flow._replace(rest=b""),
            stale=each.stale,
            draining=each.draining,
        )
        for each in found[:MOST_FLOWS]
    )
    left_out = max(len(found) - MOST_FLOWS, 0)
    archive.json("flows.json", SavedFlows(judge=report.judge, flows=saved, left_out=left_out), clean=False)


def _others(archive: _Archive) -> None:
    """Rules of others, as the programs print them that put them there; ours stand in rules-*.txt."""
    managed: set[str] = set()
    for family in Family:
        for backend, programs in available(family).items():
            name = f"{OTHERS}iptables-{backend}-{family.label}.txt"
            text = archive.ask(name, programs.saved)
            if text is None:
                continue
            short = "ip" if family is Family.IPV4 else "ip6"
            managed |= {f"{short} {line[1:]}" for line in text.split("\n") if line.startswith("*")}
            lines = [line for line in text.split("\n") if not line.startswith((f":{PREFIX}", f"-A {PREFIX}"))]
            # Without a rule, it is what every kernel has.
            if any(line.startswith("-A ") or " DROP [" in line for line in lines):
                archive.whole(name, without_secrets("\n".join(lines)))
    text = archive.ask(f"{OTHERS}nftables.txt", lambda: _nft_tables(managed))
    if text:
        archive.whole(f"{OTHERS}nftables.txt", without_secrets(text))
    text = archive.ask(f"{OTHERS}ipvs.txt", ipvs.text)
    if text:
        archive.whole(f"{OTHERS}ipvs.txt", text)


def _nft_tables(managed: Collection[str]) -> str:
    """All tables of nftables that are neither ours nor of iptables-nft.  Raises OSError, ValueError."""
    program = shutil.which("nft") or shutil.which("nft", path="/usr/sbin:/sbin")
    if program is None:
        raise ValueError("the program nft is not there")
    listed = _said([program, "list", "tables"])
    tables = [line.removeprefix("table ") for line in listed.split("\n") if line.startswith("table ")]
    ours = (OUR_TABLE, f"{OUR_TABLE}-")
    names = [each for each in tables if each not in managed and not each.partition(" ")[2].startswith(ours)]
    return "".join(_said([program, "list", "table", *each.split()]) for each in names)


def _said(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, check=False, timeout=60)  # noqa: S603  # found by name
    if done.returncode:
        raise ValueError(f"{command[0]} failed: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout.decode(errors="replace")


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
