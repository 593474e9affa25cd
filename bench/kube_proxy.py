"""kube-proxy's rules for a large cluster, as the programs print them that save rules.

What does not depend on Services is taken from the recordings of a real kube-proxy; the part of a Service is what they
have for one of its kind, with the names that kube-proxy would give to its chains.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from bench.cluster import CLUSTER_IPS, NODE, NODE_ADDRESS, PODS, PORT, TARGET_PORT, Cluster
from rules.foreign.nft_model import TABLE
from rules.iptables.tree import short_hash

RECORDING = Path(__file__).parents[1] / "tests" / "data" / "kube-proxy-v1.36.2"

_NETWORKS = {"10.244.0.0/16": PODS, "10.96.0.0/16": CLUSTER_IPS, "192.168.50.11": NODE_ADDRESS}
"""Of the recorded cluster, and what this one has instead."""
_OF_SERVICES = re.compile(r'KUBE-(?:SVC|SVL|SEP|EXT|FW)-|--comment "(?:default|kube-system)/')
_FRACTION = 1 << 31
"""In such parts the kernel keeps a probability."""


class Endpoint(NamedTuple):
    """One endpoint of a Service."""

    address: str
    chain: str
    """Its own, in iptables mode."""


class Service(NamedTuple):
    """What the rules of a Service are made of."""

    name: str
    """As comments have it: namespace, name and port."""
    address: str
    chain: str
    """In iptables mode."""
    nft_chain: str
    endpoints: tuple[Endpoint, ...]
    local: tuple[str, ...]
    """The endpoints on our node."""


def services(cluster: Cluster) -> list[Service]:
    """All Services of a cluster.

    Raises:
        ValueError: some have session affinity, of which no rules are made here.
    """
    if cluster.sticky:
        raise ValueError("rules of Services with affinity are not made")
    return [_service(cluster, number) for number in range(cluster.services)]


def _service(cluster: Cluster, number: int) -> Service:
    name = f"default/service-{number}:http"
    pods = cluster.pods(number)
    endpoints = tuple(Endpoint(pod, f"KUBE-SEP-{short_hash(f'{name}tcp{pod}:{TARGET_PORT}', 16)}") for pod in pods)
    return Service(
        name,
        cluster.cluster_ip(number),
        f"KUBE-SVC-{short_hash(f'{name}tcp', 16)}",
        f"service-{short_hash(f'{name}tcp', 8)}-default/service-{number}/tcp/http",
        endpoints,
        _local(cluster, number),
    )


def _local(cluster: Cluster, number: int) -> tuple[str, ...]:
    """The endpoints of a Service that are on our node."""
    endpoints = msgspec.json.decode(cluster.slice(number))["endpoints"]
    return tuple(each["addresses"][0] for each in endpoints if each["nodeName"] == NODE)


def _recorded(name: str) -> str:
    text = (RECORDING / name).read_text()
    for old, new in _NETWORKS.items():
        text = text.replace(old, new)
    return text


# --- iptables-save -----------------------------------------------------------------------------------------------


def iptables_save(cluster: Cluster) -> str:
    """What iptables-save prints in iptables mode."""
    found = services(cluster)
    ordered = sorted(found, key=lambda each: each.chain)
    chains = sorted(endpoint.chain for each in found for endpoint in each.endpoints)
    table = ""
    lines: list[str] = []
    for line in _recorded("iptables.iptables-save").splitlines():
        if line.startswith("*"):
            table = line
        if _OF_SERVICES.search(line):
            continue
        first = table == "*nat" and line.startswith(":KUBE-SERVICES ")
        last = table == "*nat" and line.startswith("-A KUBE-SERVICES ")
        if first:
            lines += (f":{chain} - [0:0]" for chain in chains)
        if last:
            lines += sorted(rule for each in found for rule in _endpoint_rules(each))
            lines += map(_portal_rule, found)
        lines.append(line)
        if first:
            lines += (f":{each.chain} - [0:0]" for each in ordered)
        if last:
            lines += (rule for each in ordered for rule in _service_rules(each))
    return "\n".join(lines) + "\n"


def _portal_rule(service: Service) -> str:
    return (
        f'-A KUBE-SERVICES -d {service.address}/32 -p tcp -m comment --comment "{service.name} cluster IP" '
        f"-m tcp --dport {PORT} -j {service.chain}"
    )


def _service_rules(service: Service) -> Iterator[str]:
    yield (
        f"-A {service.chain} ! -s {PODS} -d {service.address}/32 -p tcp -m comment "
        f'--comment "{service.name} cluster IP" -m tcp --dport {PORT} -j KUBE-MARK-MASQ'
    )
    for left, endpoint in zip(range(len(service.endpoints), 0, -1), service.endpoints, strict=True):
        comment = f'-m comment --comment "{service.name} -> {endpoint.address}:{TARGET_PORT}"'
        chance = ""
        if left > 1:
            kept = round(round(1 / left, 10) * _FRACTION) / _FRACTION
            chance = f" -m statistic --mode random --probability {kept:.11f}"
        yield f"-A {service.chain} {comment}{chance} -j {endpoint.chain}"


def _endpoint_rules(service: Service) -> Iterator[str]:
    comment = f'-m comment --comment "{service.name}"'
    for address, chain in service.endpoints:
        masquerade = f"-A {chain} -s {address}/32 {comment} -j KUBE-MARK-MASQ"
        translate = f"-A {chain} -p tcp {comment} -m tcp -j DNAT --to-destination {address}:{TARGET_PORT}"
        yield f"{masquerade}\n{translate}"


# --- nft list ruleset ------------------------------------------------------------------------------------------


def nft_text(cluster: Cluster) -> str:
    """What `nft list ruleset` prints in nftables mode."""
    found = services(cluster)
    table = _recorded("nftables.nft").partition("\ntable ip6 ")[0]
    elements = {
        "hairpin-connections": [f"{pod} . {pod} . tcp . {TARGET_PORT}" for each in found for pod in each.local],
        "cluster-ips": [each.address for each in found],
        "service-ips": [f"{each.address} . tcp . {PORT} : goto {each.nft_chain}" for each in found],
        "nodeport-ips": [NODE_ADDRESS],
    }
    blocks = []
    for block in table.removesuffix("\n}").split("\n\n"):
        kind, name = _OBJECT.findall(block)[-1]
        if "/" in name:
            continue
        if kind == "chain":
            blocks.append(block)
            continue
        head = block.partition("\t\telements =")[0].removesuffix("\t}")
        listed = ",\n\t\t\t     ".join(elements.get(name, ()))
        there = f"\t\telements = {{ {listed} }}\n" if listed else ""
        blocks.append(f"{head}{there}\t}}")
    blocks += (f"\tchain {each.nft_chain} {{\n\t\t{_pick(each)}\n\t}}" for each in found)
    return "\n\n".join(blocks) + "\n}\n"


_OBJECT = re.compile(r"^\t(set|map|chain) (\S+) \{$", re.MULTILINE)


def _pick(service: Service) -> str:
    pairs = ", ".join(f"{n} : {each.address} . {TARGET_PORT}" for n, each in enumerate(service.endpoints))
    return f"meta l4proto tcp dnat ip to numgen random mod {len(service.endpoints)} map {{ {pairs} }}"


# --- nft -j list ruleset -----------------------------------------------------------------------------------------


def nft_json(cluster: Cluster) -> bytes:
    """What `nft -j list ruleset` prints in nftables mode."""
    found = services(cluster)
    elements: dict[str, list[Any]] = {
        "hairpin-connections": [{"concat": [pod, pod, "tcp", TARGET_PORT]} for each in found for pod in each.local],
        "cluster-ips": [each.address for each in found],
        "service-ips": [
            [{"concat": [each.address, "tcp", PORT]}, {"goto": {"target": each.nft_chain}}] for each in found
        ],
        "nodeport-ips": [NODE_ADDRESS],
    }
    head: list[Any] = []
    sets: list[Any] = []
    chains: list[Any] = []
    rules: list[Any] = []
    for item in msgspec.json.decode(_prefixes(_recorded("nftables.nft.json")))["nftables"]:
        ((kind, value),) = item.items()
        name = value.get("chain" if kind == "rule" else "name", "")
        if value.get("family", "ip") != "ip" or "/" in name:
            continue
        if kind in {"set", "map"}:
            value.pop("elem", None)
            sets.append({kind: {**value, "elem": elements[name]} if elements.get(name) else value})
        else:
            {"chain": chains, "rule": rules}.get(kind, head).append(item)
    of = {"family": "ip", "table": TABLE}
    for handle, each in enumerate(found, 1000):
        chains.append({"chain": {**of, "name": each.nft_chain, "handle": 2 * handle}})
        rules.append({"rule": {**of, "chain": each.nft_chain, "handle": 2 * handle + 1, "expr": _expressions(each)}})
    return msgspec.json.encode({"nftables": [*head, *sets, *chains, *rules]})


def _prefixes(text: str) -> str:
    """JSON has networks as address and length."""
    for old, new in _NETWORKS.items():
        if "/" in old:
            (was, was_long), (is_, is_long) = old.split("/"), new.split("/")
            text = text.replace(f'"addr": "{was}", "len": {was_long}', f'"addr": "{is_}", "len": {is_long}')
    return text


def _expressions(service: Service) -> Iterable[Any]:
    pairs = [[n, {"concat": [each.address, TARGET_PORT]}] for n, each in enumerate(service.endpoints)]
    drawn = {"numgen": {"mode": "random", "mod": len(pairs), "offset": 0}}
    return [
        {"match": {"op": "==", "left": {"meta": {"key": "l4proto"}}, "right": "tcp"}},
        {"dnat": {"family": "ip", "addr": {"map": {"key": drawn, "data": {"set": pairs}}}}},
    ]
