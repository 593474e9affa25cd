"""Made-up clusters: objects that share whatever they can share, and what the clauses say of packets to them.

Few addresses, ports and pods, so that Services contend, addresses are the node's or another Service's, and slices hold
duplicates, ports of the same name, and endpoints in every state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from random import Random
from typing import Any

from proxy.demo import plan
from tests.reference import Answer, Asked, Reference
from tests.scenarios.schema import Answered, Case, Manifest, Silent, Target, split

SOURCES = ("p1", "p4", "c", "x", "node1")
"""Who asks: p1 is an endpoint of some Services, p4 never."""


def cases_of(reference: Reference) -> Iterator[Case]:
    """Everybody at every frontend, and beside some, with what the clauses say as a scenario would."""
    targets = dict.fromkeys(reference.frontends())
    beside = (
        (address, port + 1, protocol) for address, port, protocol in targets if address not in plan.NODE1.addresses
    )
    for address, port, protocol in {**targets, **dict.fromkeys(beside), **dict.fromkeys(_UNALLOCATED)}:
        for name in SOURCES:
            host = plan.HOSTS[name]
            own = host.ipv6[0] if ":" in address else host.ipv4[0]
            if name == "node1" and (address in plan.NODE1.addresses or reference.is_bound(address)):
                own = address  # as the kernel chooses
            asked = Asked(own, address, port, protocol)
            answer = reference.answer(asked)
            if answer == "untouched" and (name == "node1" or address in plan.NODE1.addresses):
                continue  # a matter of the node's own sockets
            if answer == "dropped" and name == "node1" and (protocol == "UDP" or own not in plan.NODE1.addresses):
                continue  # the kernel tells its own programs, by an error
            if isinstance(answer, dict) and any(split(each)[0] == own and answer[each] == "kept" for each in answer):
                continue  # it would get its own packet, from itself
            source = own if name == "node1" and own in plan.NODE1.addresses else ""
            yield Case(name, source, 0, Target(address, port, protocol), _expected(answer, reference.sticky(asked)))


def _expected(answer: Answer, sticky: bool) -> Answered | Silent:
    if isinstance(answer, str):
        return Silent(how=answer)  # type: ignore[arg-type]  # it is one of the three
    sources = {plan.HOST_OF[split(backend)[0]]: sees for backend, sees in answer.items()}
    return Answered(backends=sorted(by_host(answer)), source=sources, sticky=sticky)  # type: ignore[arg-type]  # likewise


def by_host(backends: Iterable[str]) -> set[str]:
    """Backends as probes name them: `p1:8080` for `10.244.1.11:8080`."""
    return {f"{plan.HOST_OF[address]}:{port}" for address, port in map(split, backends)}


_UNALLOCATED = (("10.96.222.222", 80, "TCP"), ("10.96.222.222", 53, "UDP"), ("fd00:10:96::ff99", 80, "TCP"))


# --- objects ---------------------------------------------------------------------------------------------------------

_CLUSTER_IPS = {
    "a": ("10.96.7.1", "fd00:10:96::701"),
    "b": ("10.96.7.2", "fd00:10:96::702"),
    "c": ("10.96.7.3", "fd00:10:96::703"),
}
_OWN = ("192.168.50.11", "fd00:50::11")
_EXTERNAL = (
    *("192.168.99.11", "192.168.99.50", "10.96.7.2", "10.96.200.9", "203.0.113.31"),
    *("fd00:99::11", "fd00:99::50", "2001:db8:113::31"),
)
_BALANCERS = ("203.0.113.1", "203.0.113.31", "192.168.99.50", "2001:db8:113::1", "2001:db8:113::31")
_RANGES = (
    *("192.168.50.0/24", " 203.0.113.0/25", "203.0.113.128/25", "10.244.1.77/24", "192.168.50.100/32", "0.0.0.0/0"),
    *("fd00:50::/64", "2001:db8:113::/64", "fd00:244::9/32", "::/0"),
)
_PORTS: tuple[tuple[str, int, str], ...] = (
    *(("", 80, "TCP"), ("http", 80, "TCP"), ("dns", 53, "UDP"), ("dns", 53, "TCP"), ("high", 30081, "TCP")),
    ("high", 30081, "UDP"),
)


def situation(random: Random) -> list[Manifest]:
    """Objects of up to three Services, of both families."""
    return [each for name in "abc" if random.random() < 0.9 for each in _service(random, name)]


def _some(random: Random, values: Iterable[Any], chance: float) -> list[Any]:
    return [each for each in values if random.random() < chance]


def _service(random: Random, name: str) -> Iterator[Manifest]:
    kind = random.choice(["ClusterIP", "NodePort", "LoadBalancer", "LoadBalancer"])
    families = random.choice([["IPv4"], ["IPv4", "IPv6"], ["IPv6", "IPv4"]])
    ips = [_CLUSTER_IPS[name][each == "IPv6"] for each in families]
    ports: dict[tuple[str, str], dict[str, Any]] = {}
    for label, number, protocol in random.sample(_PORTS, random.randint(1, 3)):
        ports[label, protocol] = {"name": label, "port": number, "protocol": protocol}
        if kind != "ClusterIP" and random.random() < 0.8:
            ports[label, protocol]["nodePort"] = random.choice([30080, 30081, 30082])
    metadata: dict[str, Any] = {"name": name, "namespace": "default"}
    if random.random() < 0.7:
        metadata["creationTimestamp"] = f"2026-01-0{random.randint(1, 3)}T00:00:00Z"
    spec: dict[str, Any] = {
        "type": kind,
        "clusterIP": ips[0],
        "clusterIPs": ips,
        "ipFamilies": families,
        "ports": list(ports.values()),
        "sessionAffinity": random.choice(["None", "None", "ClientIP"]),
        "loadBalancerSourceRanges": _some(random, _RANGES, 0.12),
        "externalIPs": _some(random, _EXTERNAL, 0.2),
    }
    if spec["sessionAffinity"] == "ClientIP":
        spec["sessionAffinityConfig"] = {"clientIP": {"timeoutSeconds": random.choice([600, 10800])}}
    if random.random() < 0.7:
        spec["externalTrafficPolicy"] = random.choice(["Cluster", "Local", "Local"])
    if random.random() < 0.4:
        spec["internalTrafficPolicy"] = random.choice(["Cluster", "Local"])
    balancers = _some(random, _BALANCERS, 0.3) if kind == "LoadBalancer" or random.random() < 0.1 else []
    ingress = [{"ip": each, **random.choice([{}, {}, {"ipMode": "VIP"}, {"ipMode": "Proxy"}])} for each in balancers]
    yield {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        "spec": spec,
        "status": {"loadBalancer": {"ingress": ingress}},
    }
    used = list(ports)
    for number in range(random.choice([0, 1, 2, 2, 3])):
        yield _slice(random, name, number, used)


def _slice(random: Random, service: str, number: int, used: list[tuple[str, str]]) -> Manifest:
    family = random.choice(["IPv4", "IPv4", "IPv6"])
    hinted = random.choice(["", "", "zones", "nodes", "both"])
    ports: list[dict[str, Any]] = []
    for label, protocol in used:
        if random.random() < 0.85:
            ports.append({"name": label, "protocol": protocol, "port": random.choice([8080, 8081])})
        if random.random() < 0.1:
            ports.append({"name": label, "protocol": protocol, "port": 8082})
    ports += random.choice([[], [], [{"name": used[0][0], "protocol": "TCP"}]])
    ports += random.choice([[], [], [{"name": "nobody", "protocol": "TCP", "port": 8083}]])
    hosts = random.choices(["p1", "p2", "p3", "q1", "q2", "q3"], k=random.choice([0, 1, 2, 3, 4]))
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{service}-{number}",
            "namespace": "default",
            "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": family,
        "ports": ports,
        "endpoints": [_endpoint(random, host, family, hinted) for host in hosts],
    }


_CONDITIONS: tuple[dict[str, Any], ...] = (
    *({}, {"ready": True}, {"ready": True, "serving": True, "terminating": False}),
    *({"ready": False}, {"ready": False, "serving": True}, {"ready": True, "serving": False}),
    *({"ready": False, "serving": True, "terminating": True}, {"ready": False, "terminating": True}),
    {"ready": False, "serving": False, "terminating": True},
    {"ready": True, "serving": True, "terminating": True},
)


def _endpoint(random: Random, name: str, family: str, hinted: str) -> dict[str, Any]:
    host = plan.HOSTS[name]
    own = host.ipv4[0] if family == "IPv4" else host.ipv6[0]
    endpoint: dict[str, Any] = {"addresses": [own], "conditions": random.choice(_CONDITIONS)}
    if random.random() < (0.6 if name == "p1" else 0.9):  # who asks may be local or not, to itself too
        endpoint["nodeName"] = host.node
    hints: dict[str, Any] = {}
    if hinted in ("zones", "both") and random.random() < 0.9:
        hints["forZones"] = [{"name": each} for each in random.choice([["za"], ["zb"], ["za", "zb"]])]
    if hinted in ("nodes", "both") and random.random() < 0.9:
        hints["forNodes"] = [{"name": each} for each in random.choice([["node1"], ["node2"], ["node1", "node2"]])]
    if hints:
        endpoint["hints"] = hints
    return endpoint
