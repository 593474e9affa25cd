"""Addresses of one family where the node has another: what is told once the node is known (CFG-58, CFG-62).

Pure.  Whether a cluster is single- or dual-stack nobody tells a node; what is known is which family its own address
comes first of, and which families its kernel carries.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from proxy.addresses import lenient_address, lenient_prefix
from proxy.config.settings import PRIMARY, HostPort, Settings
from proxy.node import NodeIPs
from rules.forwarding import Family, Prefix, family_of


class Finding(NamedTuple):
    """Something of the configuration that does not suit the node."""

    sentence: str
    fatal: bool = False
    """Whether no rules could be right, so that the agent ends."""
    hint: bool = False
    """Whether it may well be meant."""


def check(
    settings: Settings, ips: NodeIPs, served: Collection[Family], pod_cidrs: Sequence[str] = ()
) -> Iterator[Finding]:
    """What of the configuration does not suit the node.

    Args:
        settings: the configuration.
        ips: the node's addresses; the first one's family is the primary one.
        served: the families that the node carries.
        pod_cidrs: those of the Node, in detect-local mode NodeCIDR; otherwise none.
    """
    if ips.primary not in served:
        yield Finding(f'no support for primary IP family "{ips.primary.label}"', fatal=True)
        return
    if ips.known(ips.primary) is None:
        yield Finding("the node's own address is not known: if it has one, set bindAddress", hint=True)  # NOD-10
    yield from _node_ports(settings, ips, pod_cidrs)
    both = len(served) > 1
    cluster = f"the node is {ips.primary.label}-{'primary' if both else 'only'}"
    mode = settings.detect_local_mode
    for name, networks, fatal in (
        ("clusterCIDR", list(settings.cluster_cidrs), mode == "ClusterCIDR" and not both),
        ("nodePortAddresses", _prefixes(settings.node_port_addresses), False),
        ("the Node's spec.podCIDRs", _prefixes(pod_cidrs), mode == "NodeCIDR"),
        ("ipvs.excludeCIDRs", [] if both else list(settings.ipvs.excluded), False),
    ):
        others = {family_of(each.address) for each in networks} - {ips.primary}
        if others and not any(family_of(each.address) is ips.primary for each in networks):
            sentence = f"{cluster} but {name} has {others.pop().label} networks alone: add one of {ips.primary.label}"
            yield Finding(sentence, fatal)
    if both:
        return
    for name, address in (
        ("healthzBindAddress", settings.healthz_bind_address),
        ("metricsBindAddress", settings.metrics_bind_address),
    ):
        if address is not None and _is_of_another(address, ips.primary):
            yield Finding(f"{cluster} but {name} is {address}: give an address of {ips.primary.label}")


def _node_ports(settings: Settings, ips: NodeIPs, pod_cidrs: Sequence[str]) -> Iterator[Finding]:
    """Node ports that more addresses answer than was probably meant."""
    setting = settings.node_port_addresses
    if not setting:
        yield Finding(
            "nodePortAddresses is not set: node ports are answered on every address of the node; `primary` limits them "
            "to the node's own"
        )
        return
    given = [family_of(each.address) for each in _prefixes(setting)]
    families = {*given, *(each for each in Family if PRIMARY in setting and ips.known(each))}
    dual = any(
        len({family_of(each.address) for each in networks}) > 1
        for networks in (
            settings.cluster_cidrs,
            _prefixes(setting),
            settings.ipvs.excluded,
            _prefixes(pod_cidrs),
        )
    )
    if dual and families == {ips.primary}:
        [other] = set(Family) - families
        yield Finding(
            f"the cluster seems to be dual-stack, but nodePortAddresses has {ips.primary.label} networks alone: node "
            f"ports are answered on every {other.label} address of the node"
        )


def _is_of_another(address: HostPort, primary: Family) -> bool:
    """Whether an address to listen on is specific, and of another family."""
    packed = lenient_address(address.host)
    return any(packed) and family_of(packed) is not primary


def _prefixes(texts: Sequence[str]) -> list[Prefix]:
    found = []
    for text in texts:
        try:
            found.append(lenient_prefix(text))
        except ValueError:  # `primary`; anything else has been refused before
            continue
    return found
