"""The verbs that answer from an archive of `sluice bundle`, anywhere: about a node as it was.

What the agent wanted and what the kernel held are what it had then.  Rules of another proxy are decoded from the files
in which they were saved, and compared with what the objects in the archive come to.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Literal

import msgspec

from proxy import flows
from proxy import status as reporting
from proxy.agent_socket import AgentError, NoAgentError
from proxy.bundle import others
from proxy.bundle.reading import Bundle, BundleError, SavedFlows, read
from proxy.compute import compute
from proxy.doctor import verb as doctoring
from proxy.doctor.findings import Known
from proxy.doctor.verb import cluster_of
from proxy.dump import Filter
from proxy.explain.agent import troubles_of
from proxy.explain.asked import Asked, AskedAddress, parse_asked, parse_client
from proxy.explain.evidence import Evidence
from proxy.explain.verb import tell
from proxy.foreign.sources import PROXY, without_them
from proxy.objects import Key
from proxy.output import Format, Shown, select, write
from proxy.report import Status
from proxy.verify import Verified, report
from rules.diff import compare as tables_apart
from rules.diff import fit
from rules.foreign.gathering import ForeignError
from rules.forwarding import Family, ForwardingTable, Frontend, Route, family_of


def dump(name: str, format_: Format, wanted: Filter, *, of: str | None = None) -> int:
    """Print what the kernel held; 0, 1 if nothing is what was asked for, 2 if the archive cannot be read."""
    try:
        bundle = read(name)
        if others.are_meant(bundle, of):
            return others.dump(bundle, format_, wanted)
    except (BundleError, ForeignError) as error:
        return _failed("dump", error)
    held = [Shown(each.dataplane, each.table) for each in bundle.tables_of("held")]
    asked = wanted != Filter()
    if asked:
        held = [each._replace(table=select(each.table, wanted.admits)) for each in held]
    write(held, format_)
    if not any(each.table.routes for each in held) and (asked or not held):
        sys.stderr.write(
            f"sluice dump: {name}: {'no frontend is what was asked for' if asked else 'no table is in it'}\n"
        )
        return 1 if asked else 0
    return 0


def verify(name: str, format_: Literal["text", "json"], *, of: str | None = None) -> int:
    """Compare what the kernel held with what was wanted; as `sluice verify` ends."""
    try:
        bundle = read(name)
        if others.are_meant(bundle, of):
            return others.verify(bundle, format_)
        compared = tuple(_compared(bundle))
    except (BundleError, ForeignError) as error:
        return _failed("verify", error)
    if not compared:
        return _failed("verify", f"{name}: what was wanted is not in it, as no agent answered")
    return report(compared, "the agent", format_, sys.stdout)


def explain(
    name: str, target: str, client: str, *, interface: str = "", as_json: bool = False, of: str | None = None
) -> int:
    """Answer a question about the node of an archive; as `sluice explain` ends."""
    try:
        asked, who = parse_asked(target), parse_client(client, interface)
        bundle = read(name)
        evidence = others.evidence(bundle, asked) if others.are_meant(bundle, of) else _evidence(bundle, asked)
    except (ValueError, AgentError, BundleError, ForeignError) as error:
        return _failed("explain", error)
    return tell(asked, who, evidence, as_json=as_json)


def doctor(name: str, format_: Literal["text", "json"]) -> int:
    """Say what was wrong on the node of an archive; as `sluice doctor` ends."""
    try:
        bundle = read(name)
        known = _known(bundle)
    except (AgentError, BundleError, ForeignError) as error:
        return _failed("doctor", error)
    return doctoring.tell(known, format_, sys.stdout)


def status(name: str, format_: Literal["text", "json"]) -> int:
    """Print how the agent was; as `sluice status` ends."""
    try:
        bundle = read(name)
    except BundleError as error:
        return _failed("status", error)

    def told(_directory: str) -> Status:
        if bundle.status is None:
            raise NoAgentError(f"{name}: no agent answered when it was made ({_why(bundle, 'status.json')})")
        return bundle.status

    return reporting.main(format_, "", ask=told)


def conntrack(name: str, format_: flows.Format, chosen: flows.Chosen) -> int:
    """Print the flows that the node of an archive had; as `sluice conntrack` ends."""
    try:
        bundle = read(name)
    except BundleError as error:
        return _failed("conntrack", error)
    saved = bundle.flows
    if saved is None:
        return _failed("conntrack", f"{name}: no flows are in it ({_why(bundle, 'flows.json')})")
    found = _flows(saved)
    return flows.show(found._replace(flows=list(filter(chosen.admits, found.flows))), format_, sys.stdout)


# --- what is known of the node ----------------------------------------------------------------------------------


def _compared(bundle: Bundle) -> Iterator[Verified]:
    """What the kernel held, compared with what the agent wanted."""
    held = {(each.family, each.dataplane): each.table for each in bundle.tables_of("held")}
    for each in bundle.tables_of("wanted"):
        drift = tables_apart(each.table, held.get((each.family, each.dataplane)), each.capabilities)
        yield Verified(each.dataplane, drift, len(each.routes), f"the kernel, {bundle.manifest.taken}")


def _held(bundle: Bundle) -> dict[Family, ForwardingTable]:
    """What the kernel held; of remains of another mode the larger part."""
    held: dict[Family, ForwardingTable] = {}
    for each in bundle.tables_of("held"):
        if each.family not in held or len(held[each.family].routes) < len(each.routes):
            held[each.family] = each.table
    return held


def _wanted(bundle: Bundle) -> dict[Family, ForwardingTable]:
    return {each.family: fit(each.table, each.capabilities) for each in bundle.tables_of("wanted")}


def _known(bundle: Bundle) -> Known:
    """What a doctor may know of the node."""
    where = bundle.manifest
    served = {family.label for family in Family}
    if bundle.status is not None:
        served = {each.family for each in bundle.status.families}
    names = tuple(f"held {label} " for label in served)
    unread = tuple(
        f"{each.name} is not in the bundle: {each.why}" for each in where.missing if each.name.startswith(names)
    )
    if bundle.surroundings is None:
        unread = (*unread, "the node beside sluice's rules is not in the bundle: nobody can tell what it was like")
    if bundle.status is None:
        absent = f"no agent answered on {where.node}, {where.taken} ({_why(bundle, 'status.json')})"
        if others.are_meant(bundle, None) and bundle.surroundings is not None:
            return Known(
                tables=others.tables(bundle),
                surroundings=without_them(bundle.surroundings),
                absent=absent,
                carrier=PROXY,
                unread=unread,
            )
        return Known(tables=_held(bundle), surroundings=bundle.surroundings, absent=absent, unread=unread)
    return Known(
        tables=_wanted(bundle),
        cluster=cluster_of(bundle.objects, bundle.status),
        status=bundle.status,
        surroundings=bundle.surroundings,
        verified=tuple(_compared(bundle)) if bundle.status.synced else (),
        stale=doctoring.stale_of(_flows(bundle.flows)) if bundle.flows is not None else {},
        compare=f"sluice verify -f {bundle.name}",
        lacking=where.lacking,
        unread=unread,
    )


def _evidence(bundle: Bundle, asked: Asked) -> Evidence:
    """What the agent wanted and knew, and what the kernel held."""
    manifest, held = bundle.manifest, _held(bundle)
    evidence = Evidence(
        source="kernel",
        words=f"the bundle of node {manifest.node}, {manifest.taken}",
        tables=held,
        local_addresses=frozenset(manifest.addresses),
        node_ips={family_of(each): each for each in manifest.node_ips},
        kernel=held,
        surroundings=bundle.surroundings,
    )
    if bundle.status is None:
        return evidence
    tables = _wanted(bundle)
    cluster = cluster_of(bundle.objects, bundle.status)
    claims: dict[Key, dict[tuple[Family, Frontend], Route]] = {}
    if not isinstance(asked, AskedAddress) and (service := cluster.services.get(asked.key)) is not None:
        slices = cluster.slices.get(asked.key, ())
        claims[asked.key] = {
            (family, frontend): route
            for family in tables
            for frontend, route in compute(service, slices, cluster.view, family).routes.items()
        }
    winners = {each.frontend: each.winner for each in bundle.status.contested}
    troubles = troubles_of(bundle.status)
    cluster = msgspec.structs.replace(cluster, wanted=tables, claims=claims, winners=winners, troubles=troubles)
    return msgspec.structs.replace(evidence, source="agent", tables=tables, cluster=cluster)


def _flows(saved: SavedFlows) -> flows.Report:
    found = [flows.Found(each.family, each.service, each.flow, each.stale, each.draining) for each in saved.flows]
    problems = [f"{saved.left_out} flows more were there, and are not in it"] if saved.left_out else []
    return flows.Report(saved.judge, found, problems)


def _why(bundle: Bundle, name: str) -> str:
    return next((each.why for each in bundle.manifest.missing if each.name == name), "nothing says why")


def _failed(verb: str, why: object) -> int:
    sys.stderr.write(f"sluice {verb}: {why}\n")
    return 2
