"""Addresses that Services name and that nodes do not answer at: who reads the object connects there.  Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from proxy.addresses import lenient_address
from proxy.explain.cause import Cause
from proxy.objects import Service
from rules.forwarding import Address, format_address

SERVED_MODES = ("", "VIP")
"""ipMode of load balancers' addresses at which nodes answer (SVC-9)."""


def naming(services: Iterable[Service], address: Address) -> tuple[Service, ...]:
    """The Services that name an address as a load balancer's or an external one."""
    return tuple(each for each in services if address in map(_parsed, _texts(each)))


def cause_of(services: Iterable[Service], address: Address) -> Cause | None:
    """Why nothing is answered at an address that a Service names; None: no Service does."""
    shown = format_address(address)
    for service in naming(services, address):
        key = service.key
        mode = next((mode for text, mode in _left_out(service) if _parsed(text) == address), "")
        if mode:
            words = (
                f"{shown} is an address of Service {key}'s load balancer with ipMode {mode}: nodes leave it to the "
                "balancer, which comes back by node ports (TRF-16)"
            )
            next_ = f"kubectl -n {key.namespace} get service {key.name} -o jsonpath='{{.status.loadBalancer}}'"
            return Cause(kind="load-balancer-proxy", words=words, next=next_)
        if address in map(_parsed, service.spec.external_ips):
            words = (
                f"{shown} is among the externalIPs of Service {key}, and this node serves none: the feature gate "
                "AllowServiceExternalIPs is false (TRF-15), or the Service cannot be used"
            )
            return Cause(kind="external-ips-off", words=words, next=f"sluice explain {key}")
    return None


def not_answered(service: Service) -> Iterator[str]:
    """What a Service names and gets no frontend for, a line each."""
    for text, mode in _left_out(service):
        yield (
            f"{service.key} has no frontend at {text}: its load balancer has that address with ipMode {mode}, and "
            "comes back by node ports (TRF-16)"
        )
    ingress = service.status.load_balancer.ingress
    if ingress and not any(each.ip for each in ingress):
        yield (
            f"{service.key} has no frontend for its load balancer, which has a host name alone: nodes look up no "
            "names, and it comes back by node ports (SVC-9)"
        )
    if service.spec.type == "LoadBalancer" and not ingress:
        yield (
            f"{service.key} is of type LoadBalancer and has no address of one: its status is empty, which a controller "
            "(a cloud's, MetalLB) fills"
        )


def _left_out(service: Service) -> Iterator[tuple[str, str]]:
    for each in service.status.load_balancer.ingress:
        if each.ip and each.ip_mode not in SERVED_MODES:
            yield each.ip, each.ip_mode


def _texts(service: Service) -> Iterator[str]:
    yield from service.spec.external_ips
    yield from (each.ip for each in service.status.load_balancer.ingress if each.ip)


def _parsed(text: str) -> Address:
    """An address; empty: it is none."""
    try:
        return lenient_address(text.strip())
    except ValueError:
        return b""
