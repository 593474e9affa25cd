"""What the fields of a Service come to in one family: its addresses, its policies, its affinity.

The fields are texts as people and controllers wrote them.  What cannot be read is left out and told in a line of
`problems`, so that one bad address costs one frontend (SVC-8 to SVC-10).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from proxy.addresses import lenient_address, lenient_prefix
from proxy.objects import (
    PROXY_NAME_LABEL,
    PROXY_PROTOCOL_ANNOTATION,
    SCHEDULER_ANNOTATION,
    STALE_TCP_ANNOTATION,
    Service,
    ServicePort,
)
from rules.forwarding import SCHEDULERS, Address, Family, Prefix, family_of, merge_prefixes

_DEFAULT_AFFINITY = 10800
_LONGEST_AFFINITY = 86400
_BY_CHANCE = "random"
"""The scheduler that everybody has who asks for none."""
_SAME_SCHEDULERS = {"rr": "round-robin", "lc": "least-connections"}
"""What the kernel's IPVS calls them."""


class Exposure(NamedTuple):
    """What all service ports of a Service have in common."""

    cluster_ip: Address
    external_ips: tuple[Address, ...]
    load_balancer: tuple[Address, ...]
    source_ranges: tuple[Prefix, ...]
    internal_local: bool
    external_local: bool
    affinity: int
    forget_unanswered: bool
    """Whether TCP connections to an endpoint that is gone are forgotten as long as nobody has answered them."""
    scheduler: str = ""
    """One of `SCHEDULERS`; empty: chance."""
    proxy_protocol: bool = False
    """Whether backends of TCP ports are sent a header of the PROXY protocol."""

    def accessible(self, port: ServicePort) -> bool:
        """Whether anything but ClusterIP leads to the service port (SEL-2)."""
        return bool(port.node_port or self.load_balancer or self.external_ips)


def exposure_of(
    service: Service, family: Family, *, node_ip: Address | None, external_ips: bool, problems: list[str]
) -> Exposure | None:
    """What a Service exposes in a family, or None when it gets no rules in it (SVC-1, SVC-4, SVC-5).

    `node_ip` is the node's address of the family, `external_ips` the gate AllowServiceExternalIPs (TRF-15).  What
    cannot be used is appended to `problems`, a line each.
    """
    spec = service.spec
    cluster_ip = _cluster_ip(service, family, problems)
    if cluster_ip is None:
        return None
    # `hostname` entries have no address; Proxy entries come back by the node port (SVC-9, TRF-16).
    ingress = [each.ip for each in service.status.load_balancer.ingress if each.ip and each.ip_mode in ("", "VIP")]
    load_balancer = _own_family(ingress, family, "status.loadBalancer.ingress", problems)
    exposed = spec.type in ("LoadBalancer", "NodePort") or (spec.type == "ClusterIP" and bool(spec.external_ips))
    return Exposure(
        cluster_ip=cluster_ip,
        external_ips=_own_family(spec.external_ips, family, "spec.externalIPs", problems) if external_ips else (),
        load_balancer=load_balancer,
        source_ranges=_source_ranges(service, family, load_balancer, node_ip, problems),
        internal_local=spec.internal_traffic_policy == "Local",  # SVC-12
        external_local=spec.external_traffic_policy == "Local" and exposed,  # SVC-11
        affinity=_affinity(service, problems),
        forget_unanswered=_asks(service, STALE_TCP_ANNOTATION, "delete-unanswered", problems),
        scheduler=_scheduler(service, problems),
        proxy_protocol=_asks(service, PROXY_PROTOCOL_ANNOTATION, "v2", problems),
    )


def wants_rules(service: Service) -> bool:
    """Whether a Service is this proxy's business: headless ones and others' are not (SVC-1, SVC-5)."""
    spec = service.spec
    return (
        PROXY_NAME_LABEL not in service.metadata.labels
        and spec.type != "ExternalName"
        and spec.cluster_ip not in ("", "None")
    )


def _cluster_ip(service: Service, family: Family, problems: list[str]) -> Address | None:
    """The ClusterIP of a family, or None for a Service that gets no rules in it (SVC-1, SVC-4, SVC-5)."""
    spec = service.spec
    if not wants_rules(service):
        return None
    if spec.ip_families:
        wanted, text = family.label, None
        for label, cluster_ip in zip(spec.ip_families, spec.cluster_ips, strict=False):
            if label == wanted:
                text = cluster_ip
                break
    else:
        text = spec.cluster_ip
    if text is None:
        return None
    try:
        address = lenient_address(text)
    except ValueError as error:
        problems.append(f"spec.clusterIP: {error}")
        return None
    if family_of(address) is family:
        return address
    if spec.ip_families:
        problems.append(f"spec.clusterIPs: {text} is not {family.label}, as spec.ipFamilies says")
    return None


def _own_family(texts: Sequence[str], family: Family, field: str, problems: list[str]) -> tuple[Address, ...]:
    """The addresses of a family among `texts`, each once; blank texts are silently none (SVC-8)."""
    addresses = []
    for text in texts:
        if not text or text.isspace():
            continue
        try:
            address = lenient_address(text)
        except ValueError as error:
            problems.append(f"{field}: {error}")
            continue
        if len(address) == family.address_bytes:
            addresses.append(address)
    return tuple(dict.fromkeys(addresses))


def _source_ranges(
    service: Service,
    family: Family,
    load_balancer: Sequence[Address],
    node_ip: Address | None,
    problems: list[str],
) -> tuple[Prefix, ...]:
    """Who may use the load balancer addresses, merged; empty: everybody (SVC-10)."""
    texts = service.spec.load_balancer_source_ranges
    if not texts:
        return ()
    ranges = []
    unread = False
    for text in texts:
        try:
            prefix = lenient_prefix(text.strip())
        except ValueError as error:
            problems.append(f"spec.loadBalancerSourceRanges: {error}")
            unread = True
            continue
        if len(prefix.address) == family.address_bytes:
            ranges.append(prefix)
    if unread and not ranges:
        problems.append(f"spec.loadBalancerSourceRanges: none is left for {family.label}, so every source is admitted")
    if node_ip is not None and any(node_ip in prefix for prefix in ranges):
        # The node often takes the address it connects to as its source (TRF-18).
        ranges += [Prefix(address, family.address_bytes * 8) for address in load_balancer]
    merged = merge_prefixes(ranges)
    return () if merged and merged[0].length == 0 else merged


def _affinity(service: Service, problems: list[str]) -> int:
    if service.spec.session_affinity != "ClientIP":
        return 0
    seconds = service.spec.session_affinity_config.client_ip.timeout_seconds
    if 0 < seconds <= _LONGEST_AFFINITY:
        return seconds
    problems.append(
        f"spec.sessionAffinityConfig.clientIP.timeoutSeconds: {seconds} is not in 1..{_LONGEST_AFFINITY}, "
        f"{_DEFAULT_AFFINITY} is used"
    )
    return _DEFAULT_AFFINITY


def _asks(service: Service, annotation: str, word: str, problems: list[str]) -> bool:
    """Whether an annotation says the one word that it can."""
    value = service.metadata.annotations.get(annotation, "")
    if value not in ("", word):
        problems.append(f"annotation {annotation}: {value!r} is not {word}")
    return value == word


def _scheduler(service: Service, problems: list[str]) -> str:
    value = service.metadata.annotations.get(SCHEDULER_ANNOTATION, "")
    value = _SAME_SCHEDULERS.get(value, value)
    if value in SCHEDULERS:
        return value
    if value not in ("", _BY_CHANCE):
        known = ", ".join([_BY_CHANCE, *sorted(SCHEDULERS)])
        problems.append(f"annotation {SCHEDULER_ANNOTATION}: {value!r} is none of {known}; {_BY_CHANCE} is used")
    return ""
