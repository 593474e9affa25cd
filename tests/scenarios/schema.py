"""Scenarios as data: what a file in this directory says, read and checked.  README.md describes the format.

Nothing here does I/O but `load`: the layers that run scenarios (namespaces, virtual machines, `explain`) share it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
from ryaml import InvalidYamlError, loads_all  # type: ignore[attr-defined]  # its stubs don't export them

from rules.dataplane import Capabilities

DIRECTORY = Path(__file__).parent
CLUSTER = DIRECTORY / "base" / "cluster.yaml"
"""The nodes and the service CIDR that every scenario has unless it says `cluster: false`."""
REPOSITORY = DIRECTORY.parent.parent

EVERYTHING = Capabilities()
"""What nftables can, for which scenarios are written."""
MEANS = {"userspace": "iptables", "ipvs": "iptables"}
"""Modes that mean what another one means, unless a probe says otherwise (DESIGN 4.10)."""

_CLUSTER_SCOPED = ("Node", "ServiceCIDR")

Source = Literal["kept", "masqueraded"]
Manifest = dict[str, Any]


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Answered(_Part, frozen=True):
    """Connections are answered, by each of these backends and by no other."""

    backends: list[str]
    """`host:port`, or `address:port` for an endpoint that is no host of the cluster."""
    source: Source | dict[str, Source]
    """What the backend sees: the client itself, or an address of the node; by host where they differ (hairpin)."""
    sticky: bool = False
    """One client gets one backend of the list, whichever, every time (affinity)."""


class Silent(_Part, frozen=True):
    """No connection is made."""

    how: Literal["refused", "dropped", "untouched"]


Expectation = Answered | Silent


class InMode(_Part, frozen=True):
    """How a mode differs, and the clause that says so."""

    expect: str | Answered
    clauses: list[str]


class ProbeGroup(_Part, frozen=True):
    """Probes as written: every `from` tries every `to`."""

    from_: str | list[str] = msgspec.field(name="from")
    to: str | list[str]
    expect: str | Answered
    clauses: list[str] = []
    modes: dict[str, InMode] = {}
    source_port: int = 0


class Patch(_Part, frozen=True):
    """A change of one object: `merge` is a JSON merge patch (a null deletes a field, a list replaces a list)."""

    object: str
    merge: dict[str, Any]


class Step(_Part, frozen=True):
    """Changes, all at once, and probes when they have been applied."""

    about: str = ""
    apply: list[Manifest] = []
    apply_files: list[str] = []
    patch: list[Patch] = []
    delete: list[str] = []
    restart: bool = False
    """The agent is stopped before the changes and started again after them."""
    probes: list[ProbeGroup] = []


class Header(_Part, frozen=True):
    """The first document of a file."""

    about: str
    clauses: list[str] = []
    families: tuple[Literal["IPv4", "IPv6"], ...] = ("IPv4",)
    only_modes: list[str] = []
    """Empty: every mode.  Else the modes that the situation exists in."""
    config: dict[str, Any] = {}
    """A fragment of KubeProxyConfiguration."""
    cluster: bool = True
    files: list[str] = []
    """Manifests of the repository, such as `examples/redis.yaml`, that stand beside the objects of this file."""
    probes: list[ProbeGroup] = []
    """Probes of the objects as they are in the file: the only step of most scenarios."""
    steps: list[Step] = []


class Target(NamedTuple):
    """Where a probe connects."""

    address: str
    port: int
    protocol: str

    def __str__(self) -> str:
        return f"{join(self.address, self.port)}/{self.protocol}"


class Case(NamedTuple):
    """One probe: one client, one target, one expectation, in one mode."""

    host: str
    source: str
    source_port: int
    target: Target
    expect: Expectation

    def __str__(self) -> str:
        client = f"{self.host}@{self.source}" if self.source else self.host
        return f"{client} -> {self.target}"


class Scenario(NamedTuple):
    """One file."""

    name: str
    header: Header
    objects: list[Manifest]
    """The objects at the beginning."""

    @property
    def steps(self) -> list[Step]:
        first = [Step(probes=self.header.probes)] if self.header.probes else []
        return first + self.header.steps

    def cites(self) -> set[str]:
        """Every clause that the scenario says it shows."""
        found = set(self.header.clauses)
        for step in self.steps:
            for group in step.probes:
                found.update(group.clauses, *(each.clauses for each in group.modes.values()))
        return found


def load(path: Path) -> Scenario:
    """The scenario in a file.

    Raises:
        ValueError: it is not as README.md says; the message names the file.
    """
    try:
        first, *objects = loads_all(path.read_text())
        header = msgspec.convert(first, Header)
        files = [each for file in header.files for each in manifests(REPOSITORY / file)]
        scenario = Scenario(path.stem, header, files + objects)
        for step in scenario.steps:
            for group in step.probes:
                for mode in ("", *group.modes):
                    list(cases(group, mode))
    except (ValueError, InvalidYamlError) as error:
        raise ValueError(f"{path.name}: {error}") from error
    return scenario


def load_all() -> list[Scenario]:
    """Every scenario, those of one configuration side by side, so that the agent need not start for each."""
    return in_order(load(path) for path in files())


def files() -> list[Path]:
    """The files of all scenarios."""
    return [path for path in sorted(DIRECTORY.glob("*.yaml")) if path.name != "coverage.yaml"]


def in_order(scenarios: Iterable[Scenario]) -> list[Scenario]:
    """Scenarios, those of one configuration side by side."""
    return sorted(scenarios, key=lambda scenario: (msgspec.json.encode(scenario.header.config), scenario.name))


def manifests(path: Path) -> list[Manifest]:
    """The objects in a file, those of a List one by one."""
    objects: list[Manifest] = []
    for document in loads_all(path.read_text()):
        if document:
            objects += document["items"] if document.get("kind") == "List" else [document]
    return objects


def cases(group: ProbeGroup, mode: str, can: Capabilities = EVERYTHING) -> Iterator[Case]:
    """The single probes of a group, as they are expected in a mode whose dataplane can do so much.

    What it cannot carry at all is left out.  Where it cannot keep sources, the backends of everybody see the node.

    Raises:
        ValueError: a target or an expectation cannot be read.
    """
    meant = next((each for each in (mode, MEANS.get(mode)) if each in group.modes), None)
    expect = group.modes[meant].expect if meant is not None else group.expect
    wanted = Silent(how=expect) if isinstance(expect, str) else expect  # type: ignore[arg-type]  # checked below
    if isinstance(wanted, Silent) and wanted.how not in ("refused", "dropped", "untouched"):
        raise ValueError(f"expect: {expect} is not refused, dropped, untouched or a mapping with backends")
    if isinstance(wanted, Answered) and not can.source_address:
        wanted = msgspec.structs.replace(wanted, source="masqueraded")
    for client in _listed(group.from_):
        host, _, source = client.partition("@")
        for text in _listed(group.to):
            target = parse_target(text)
            if target.protocol == "SCTP" and not can.sctp:
                continue
            if source and ipaddress.ip_address(source).version != ipaddress.ip_address(target.address).version:
                raise ValueError(f"{client} cannot reach {text}: another family")
            yield Case(host, source, group.source_port, target, wanted)


def beyond(group: ProbeGroup, mode: str, can: Capabilities) -> Iterator[str]:
    """What of a group's probes is not looked at because a dataplane cannot do it: the capability, once for each."""
    told = {str(each.target): each for each in cases(group, mode, can)}
    for case in cases(group, mode):
        if case.target.protocol == "SCTP" and not can.sctp:
            yield "sctp"
        elif isinstance(case.expect, Answered) and case.expect != told[str(case.target)].expect:
            yield "source_address"


def parse_target(text: str) -> Target:
    """`address:port`, `[address]:port`, and `/UDP` or `/SCTP` after it.

    Raises:
        ValueError: it is neither.
    """
    endpoint, _, protocol = text.partition("/")
    if protocol not in ("", "TCP", "UDP", "SCTP"):
        raise ValueError(f"{text}: {protocol} is not TCP, UDP or SCTP")
    address, port = split(endpoint)
    return Target(str(ipaddress.ip_address(address)), port, protocol or "TCP")


def split(endpoint: str) -> tuple[str, int]:
    """Host or address, and port."""
    host, separator, port = endpoint.rpartition(":")
    if not separator or not port.isdecimal():
        raise ValueError(f"{endpoint} is not host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)


def join(address: str, port: int) -> str:
    """An address and a port as they stand together."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def key_of(manifest: Manifest) -> str:
    """How steps name an object: `Service/default/web`, `Node/node1`."""
    metadata = manifest["metadata"]
    namespace = metadata.get("namespace", "" if manifest["kind"] in _CLUSTER_SCOPED else "default")
    return "/".join(name for name in (manifest["kind"], namespace, metadata["name"]) if name)


def merge(value: Any, patch: Any) -> Any:
    """A JSON merge patch (RFC 7386)."""
    if not isinstance(patch, dict):
        return patch
    result = dict(value) if isinstance(value, dict) else {}
    for name, part in patch.items():
        if part is None:
            result.pop(name, None)
        else:
            result[name] = merge(result.get(name), part)
    return result


def after(objects: dict[str, Manifest], step: Step) -> dict[str, Manifest]:
    """The objects once the step's changes are made.

    Raises:
        ValueError: a change names an object that is not there.
    """
    result = dict(objects)
    files = [each for file in step.apply_files for each in manifests(REPOSITORY / file)]
    for manifest in [*files, *step.apply]:
        result[key_of(manifest)] = manifest
    for patch in step.patch:
        if patch.object not in result:
            raise ValueError(f"there is no {patch.object} to patch")
        result[patch.object] = merge(result[patch.object], patch.merge)
    for key in step.delete:
        if key not in result:
            raise ValueError(f"there is no {key} to delete")
        del result[key]
    return result


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value
