"""Plain v1 Endpoints as EndpointSlices: what the cluster's EndpointSliceMirroring controller does.

In a cluster the controller mirrors the Endpoints of Services without a selector only, as another controller makes the
slices of those with one.  Where objects come from files there is neither, so here Endpoints are mirrored whenever no
slice names their Service, with a selector or without; with the first slice that does, the mirrored ones are gone.
Otherwise as in the cluster:

* subsets are repacked first: addresses with the same ports are one subset, and an address that is both ready and not
  ready for a port is not ready;
* each subset becomes one slice per address family; not-ready addresses are endpoints with `ready: false`;
* of each subset at most 1,000 addresses are mirrored, ready ones first;
* addresses are read leniently and printed canonically; what is no address is left out;
* labels and annotations are copied (save for those that describe the Endpoints object itself);
* the label `endpointslice.kubernetes.io/skip-mirror: "true"` and leader-election records are honoured.

The name of a mirrored slice follows from the Service, the family and the ports, so it stays when addresses change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from proxy.addresses import lenient_address
from proxy.objects import (
    SERVICE_NAME_LABEL,
    TRIGGER_TIME_ANNOTATION,
    Conditions,
    EndpointAddress,
    EndpointPort,
    Endpoints,
    EndpointSlice,
    Key,
    Metadata,
    SliceEndpoint,
    SlicePort,
)
from rules.forwarding import family_of, format_address

MAX_ADDRESSES = 1000
"""Addresses of one subset that are mirrored."""
MANAGED_BY_LABEL = "endpointslice.kubernetes.io/managed-by"
MANAGER = "endpointslicemirroring-controller.k8s.io"
SKIP_LABEL = "endpointslice.kubernetes.io/skip-mirror"
LEADER_ANNOTATION = "control-plane.alpha.kubernetes.io/leader"
LAST_APPLIED_ANNOTATION = "kubectl.kubernetes.io/last-applied-configuration"


class Mirrored(NamedTuple):
    """What `mirror` makes: slices, and for Endpoints that are not mirrored whole a reason each."""

    slices: tuple[EndpointSlice, ...]
    problems: dict[Key, str]


def mirror(endpoints: Iterable[Endpoints], slices: Iterable[EndpointSlice]) -> Mirrored:
    """Slices for those Endpoints whose Service has none among `slices`.

    A mirrored slice never takes the key of another one: the other one wins.
    """
    known = list(slices)
    served = {each.service for each in known}
    taken = {each.key for each in known}
    made: list[EndpointSlice] = []
    problems: dict[Key, str] = {}
    for each in endpoints:
        if each.key in served or each.metadata.labels.get(SKIP_LABEL) == "true":
            continue
        if LEADER_ANNOTATION in each.metadata.annotations:
            continue
        own, problem = _slices_of(each)
        made += (one for one in own if one.key not in taken)
        if problem:
            problems[each.key] = problem
    return Mirrored(tuple(made), problems)


class _Subset(NamedTuple):
    ports: tuple[EndpointPort, ...]
    addresses: dict[EndpointAddress, bool]
    """Each address and whether it is ready."""


def _slices_of(endpoints: Endpoints) -> tuple[list[EndpointSlice], str | None]:
    slices: list[EndpointSlice] = []
    invalid: list[str] = []
    beyond = 0
    for subset in _repack(endpoints):
        families: dict[str, list[SliceEndpoint]] = {}
        count = 0
        for address, ready in sorted(subset.addresses.items(), key=lambda item: not item[1]):
            try:
                packed = lenient_address(address.ip)
            except ValueError:
                invalid.append(address.ip)
                continue
            if count == MAX_ADDRESSES:
                beyond += 1
                continue
            count += 1
            endpoint = SliceEndpoint(
                addresses=(format_address(packed),), conditions=Conditions(ready=ready), node_name=address.node_name
            )
            families.setdefault(family_of(packed).label, []).append(endpoint)
        slices += (_slice(endpoints, family, subset.ports, found) for family, found in sorted(families.items()))
    reasons = []
    if invalid:
        others = f", nor are {len(invalid) - 1} more" if invalid[1:] else ""
        reasons.append(f"subsets: {invalid[0]!r} is no IP address{others}")
    if beyond:
        reasons.append(
            f"subsets: {beyond} addresses over {MAX_ADDRESSES} in one subset are left out: use EndpointSlices"
        )
    return slices, "; ".join(reasons) or None


def _repack(endpoints: Endpoints) -> list[_Subset]:
    """The subsets in the form in which no two have the same ports and no address stands twice."""
    ready_for: dict[EndpointAddress, dict[EndpointPort | None, bool]] = {}
    for subset in endpoints.subsets:
        ports: Sequence[EndpointPort | None] = subset.ports or [None]
        for addresses, ready in ((subset.addresses, True), (subset.not_ready_addresses, False)):
            for address in addresses:
                states = ready_for.setdefault(address, {})
                for port in ports:
                    states[port] = ready and states.get(port, True)
    packed: dict[tuple[EndpointPort, ...], dict[EndpointAddress, bool]] = {}
    for address, states in ready_for.items():
        for ready in (True, False):
            matching = [port for port, state in states.items() if state is ready]
            if matching:
                of_ports = tuple(sorted((port for port in matching if port is not None), key=_port_order))
                packed.setdefault(of_ports, {})[address] = ready
    return [_Subset(ports, addresses) for ports, addresses in sorted(packed.items(), key=lambda item: _order(item[0]))]


def _port_order(port: EndpointPort) -> tuple[str, str, int]:
    return (port.name, port.protocol, port.port)


def _order(ports: tuple[EndpointPort, ...]) -> list[tuple[str, str, int]]:
    return [_port_order(port) for port in ports]


def _slice(
    endpoints: Endpoints, family: str, ports: tuple[EndpointPort, ...], found: list[SliceEndpoint]
) -> EndpointSlice:
    metadata = endpoints.metadata
    digest = hashlib.sha256(repr((family, _order(ports))).encode()).hexdigest()[:8]
    dropped = (TRIGGER_TIME_ANNOTATION, LAST_APPLIED_ANNOTATION)
    return EndpointSlice(
        metadata=Metadata(
            name=f"{metadata.name}-mirror-{digest}",
            namespace=metadata.namespace,
            labels={**metadata.labels, SERVICE_NAME_LABEL: metadata.name, MANAGED_BY_LABEL: MANAGER},
            annotations={name: value for name, value in metadata.annotations.items() if name not in dropped},
            creation_timestamp=metadata.creation_timestamp,
        ),
        address_type=family,
        endpoints=tuple(found),
        ports=tuple(SlicePort(name=port.name, protocol=port.protocol, port=port.port) for port in ports),
    )
