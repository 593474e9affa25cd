"""Another proxy's rules in an archive of `sluice bundle`: dumped, explained, and compared with the objects in it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec

from proxy.bundle.reading import OTHERS, Bundle
from proxy.config.settings import Settings
from proxy.dump import Filter
from proxy.explain.asked import Asked
from proxy.explain.evidence import Evidence
from proxy.foreign import dump as other
from proxy.foreign import wanted
from proxy.foreign.choice import SLUICE
from proxy.foreign.explain import as_held, notes_of, one_each, with_names, without_device
from proxy.foreign.sources import PROXY, Found, without_them
from proxy.foreign.wanted import Objects
from proxy.node import Interfaces
from proxy.output import Format
from proxy.verify import Verified, report
from rules.diff import compare
from rules.foreign import detect
from rules.foreign.comparison import as_held_by, capabilities_of, named
from rules.foreign.detect import Decoded
from rules.foreign.gathering import ForeignError
from rules.forwarding import Family, ForwardingTable, family_of


def are_meant(bundle: Bundle, of: str | None) -> bool:
    """Whether a verb is about another proxy's rules: where somebody says so, else where nothing of ours is in it."""
    if of is not None:
        return of != SLUICE
    ours = bundle.status is not None or bool(bundle.tables_of("held"))
    return not ours and any(b"KUBE-SERVICES" in data or b"kube-proxy" in data for data in bundle.others.values())


def tables(bundle: Bundle) -> dict[Family, ForwardingTable]:
    """What the other proxy's rules are.  Raises ForeignError."""
    return {family: each.reading.table for family, each in one_each(_found(bundle))[0].items()}


def dump(bundle: Bundle, format_: Format, asked: Filter) -> int:
    """Print what the other proxy's rules were; as `sluice dump` ends.  Raises ForeignError."""
    return other.main((), format_, asked, read=lambda: _found(bundle))


def verify(bundle: Bundle, format_: Literal["text", "json"]) -> int:
    """Compare the other proxy's rules with what the objects come to; as `sluice verify` ends.

    Raises:
        ForeignError: there are none that can be read, or no objects.
    """
    objects = _objects(bundle)
    if objects is None:
        raise ForeignError(
            f"{bundle.name}: the objects are not in it, as no agent answered; others-*.txt in it are files for "
            "sluice verify -f FILE -f OBJECTS"
        )
    notes: dict[str, None] = {}
    verified = list(_verified(bundle, objects, notes))
    for note in notes:
        sys.stderr.write(f"sluice verify: {note}\n")
    return report(verified, "the objects in the bundle", format_, sys.stdout, tuple(notes))


def evidence(bundle: Bundle, asked: Asked) -> Evidence:
    """What the other proxy's rules say, beside the objects where they are known.  Raises ForeignError."""
    from proxy.explain.manifests import from_manifests  # noqa: PLC0415  # YAML, which other verbs do without

    manifest = bundle.manifest
    readings, problems = one_each(_found(bundle))
    tables = {family: each.reading.table for family, each in readings.items()}
    title = next(iter(readings.values())).title
    around = bundle.surroundings
    found = Evidence(
        source="kernel",
        words=f"{title} in the bundle of node {manifest.node}, {manifest.taken}",
        tables=tables,
        local_addresses=frozenset(manifest.addresses),
        node_ips={family_of(each): each for each in manifest.node_ips},
        kernel=tables,
        proxy=PROXY,
        surroundings=without_them(around) if around is not None else None,
        problems=tuple(problems),
    )
    found = without_device(found, readings)
    objects = _objects(bundle)
    if objects is None:
        return msgspec.structs.replace(found, problems=(*found.problems, *notes_of(readings, asked, None)))
    reading = next(iter(readings.values())).reading
    told = wanted.in_mode(_settings(bundle), reading.mode)
    manifests = from_manifests(
        objects.loaded, told, manifest.node, asked, interfaces={"node": tuple(found.local_addresses)}
    )
    tables = {family: each.reading.table for family, each in with_names(readings, manifests.cluster).items()}
    return msgspec.structs.replace(
        found,
        tables=tables,
        kernel=tables,
        cluster=as_held(manifests.cluster, readings, configured=False),
        problems=(*found.problems, *notes_of(readings, asked, manifests.cluster)),
    )


def _found(bundle: Bundle) -> list[Found]:
    """The other proxy's rules.

    Raises:
        ForeignError: there are none, or none that can be read.
    """
    gathered = detect.Gathered()
    reasons: list[str] = []
    for name, data in sorted(bundle.others.items()):
        try:
            gathered.add(name, data)
        except ForeignError as error:
            reasons.append(f"{name}: {error}")
    decoded: Sequence[Decoded] = ()
    try:
        decoded = gathered.readings(strict=False)
    except ForeignError as error:
        reasons.append(str(error))
    found = [
        Found(f"{bundle.name}: {each.where}", _words(each.names[0], each.reading.mode), each.reading)
        for each in decoded
    ]
    if not found:
        why = f" ({'; '.join(reasons)})" if reasons else ""
        raise ForeignError(f"{bundle.name}: no rules of {PROXY} are in it{why}")
    return found


def _words(name: str, mode: str) -> str:
    """What the rules of a file are: `others-iptables-nft-IPv4.txt`, `others-nftables.txt`."""
    if mode == "ipvs":
        return mode
    words = name.removeprefix(OTHERS).removesuffix(".txt")
    for family in Family:
        words = words.removesuffix(f"-{family.label}")
    return words


def _verified(bundle: Bundle, objects: Objects, notes: dict[str, None]) -> Iterator[Verified]:
    """The comparison of each family; what is wrong with the objects is added to `notes`."""
    for each in _found(bundle):
        reading = each.reading
        node = bundle.manifest.node
        tables, problems = wanted.tables(objects, _settings(bundle), node, reading.mode, _interfaces(bundle))
        notes.update(dict.fromkeys(problems))
        table = tables[reading.table.family]
        told = as_held_by(reading, table, configured=False)
        drift = compare(told, named(reading, table).table, capabilities_of(reading.mode))
        yield Verified(each.title, drift, len(table.routes), f"the kernel, {bundle.manifest.taken}")


def _objects(bundle: Bundle) -> Objects | None:
    """The objects of the archive as manifests."""
    from proxy.sources.manifest_loading import loads  # noqa: PLC0415  # YAML, which other verbs do without

    if not bundle.objects:
        return None
    whole = msgspec.json.encode({"apiVersion": "v1", "kind": "List", "items": bundle.objects})
    return Objects(loads("objects.json", whole), bundle.name)


def _settings(bundle: Bundle) -> Settings:
    return Settings(hostname_override=bundle.manifest.node)


def _interfaces(bundle: Bundle) -> Interfaces:
    return {"node": bundle.manifest.addresses}
