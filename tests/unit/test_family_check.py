"""What is told of a configuration whose addresses do not suit the node (CFG-58, CFG-62)."""

from __future__ import annotations

import asyncio

import pytest

from proxy import own_node
from proxy.config.load import load
from proxy.config.settings import Settings
from proxy.family_check import check
from proxy.node import node_ips
from proxy.opening import FatalError
from proxy.sources.base import Resource
from proxy.state import State
from rules.forwarding import Family
from tests.builders import NODE, node

BOTH = tuple(Family)
V4, V6 = Family
ADDRESSES = {
    "": [],
    "4": ["192.168.0.2"],
    "6": ["fd00::2"],
    "46": ["192.168.0.2", "fd00::2"],
    "64": ["fd00::2", "192.168.0.2"],
}
UNSET = "nodePortAddresses is not set: node ports are answered on every address of the node; `primary` limits them "
UNSET += "to the node's own"
ONE_OF_TWO = (
    "the cluster seems to be dual-stack, but nodePortAddresses has IPv4 networks alone: node ports are answered "
    "on every IPv6 address of the node"
)


def found(flags, addresses="4", served=BOTH, pod_cidrs=()):
    ips = node_ips(node(addresses={"InternalIP": ADDRESSES[addresses]}))
    given = {"nodeport-addresses": "192.168.0.0/16,fd00::/16", **{k.replace("_", "-"): v for k, v in flags.items()}}
    settings = load([(name, text) for name, text in given.items() if text is not None]).settings
    return [each[:2] for each in check(settings, ips, served, pod_cidrs)]


def only(name, other, primary="IPv4", kind="primary", *, fatal=False):
    return [(f"the node is {primary}-{kind} but {name} has {other} networks alone: add one of {primary}", fatal)]


CASES = {
    "all is well": ({"cluster_cidr": "10.0.0.0/8"}, {}, []),
    "an unknown address (NOD-10)": (
        {},
        {"addresses": ""},
        [("the node's own address is not known: if it has one, set bindAddress", False)],
    ),
    "both families": ({"cluster_cidr": "10.0.0.0/8,fd00:1::/32"}, {"addresses": "46"}, []),
    "node ports on every address": ({"nodeport_addresses": None}, {}, [(UNSET, False)]),
    "node ports of nftables are primary": ({"nodeport_addresses": None, "proxy_mode": "nftables"}, {}, []),
    "node ports of one family of two": (
        {"cluster_cidr": "10.0.0.0/8,fd00:1::/32", "nodeport_addresses": "192.168.0.0/16"},
        {"addresses": "46"},
        [
            (ONE_OF_TWO, False),
        ],
    ),
    "primary where both addresses are known": (
        {"cluster_cidr": "10.0.0.0/8,fd00:1::/32", "nodeport_addresses": "primary"},
        {"addresses": "46"},
        [],
    ),
    "node ports of the other family": (
        {"nodeport_addresses": "fd00::/16"},
        {},
        only("nodePortAddresses", "IPv6"),
    ),
    "pods of the other family": ({"cluster_cidr": "fd00:1::/32"}, {}, only("clusterCIDR", "IPv6")),
    "pods of the other family, which the node lacks": (
        {"cluster_cidr": "fd00:1::/32"},
        {"served": (V4,)},
        only("clusterCIDR", "IPv6", kind="only", fatal=True),
    ),
    "the same where it does not matter": (
        {"cluster_cidr": "fd00:1::/32", "detect_local_mode": "BridgeInterface", "pod_bridge_interface": "br0"},
        {"served": (V4,)},
        only("clusterCIDR", "IPv6", kind="only"),
    ),
    "pods of the other family on an IPv6 node": (
        {"cluster_cidr": "10.0.0.0/8"},
        {"addresses": "64"},
        only("clusterCIDR", "IPv4", "IPv6"),
    ),
    "podCIDRs of the other family": (
        {"detect_local_mode": "NodeCIDR"},
        {"pod_cidrs": ("fd00:1::/64",)},
        only("the Node's spec.podCIDRs", "IPv6", fatal=True),
    ),
    "servers at addresses of a family that the node lacks": (
        {"healthz_bind_address": "[fd00::2]:10256", "metrics_bind_address": "[::1]:10249"},
        {"served": (V4,)},
        [
            ("the node is IPv4-only but healthzBindAddress is [fd00::2]:10256: give an address of IPv4", False),
            ("the node is IPv4-only but metricsBindAddress is [::1]:10249: give an address of IPv4", False),
        ],
    ),
    "an unspecified address of the other family is fine": (
        {"healthz_bind_address": "[::]:10256"},
        {"served": (V4,)},
        [],
    ),
    "what ipvs leaves alone, of the other family": (
        {"proxy_mode": "ipvs", "ipvs_exclude_cidrs": "fd00:5::/32"},
        {"served": (V4,)},
        only("ipvs.excludeCIDRs", "IPv6", kind="only"),
    ),
    "the same in another mode": ({"ipvs_exclude_cidrs": "fd00:5::/32"}, {"served": (V4,)}, []),
    "the primary family is not served": (
        {"nodeport_addresses": None},
        {"addresses": "64", "served": (V4,)},
        [('no support for primary IP family "IPv6"', True)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_cfg_58_62(name):
    flags, more, expected = CASES[name]
    assert found(flags, **more) == expected


def test_cfg_58_findings_are_told_and_fatal_ones_end_the_agent(capsys):
    async def test():
        state = State(NODE)
        own = own_node.OwnNode(NODE, Settings(), state)
        state.replace(Resource.NODES, [node(addresses={"InternalIP": ["fd00::2"]})])
        own.check(Settings(), BOTH, {})
        shown = capsys.readouterr()
        assert "nodePortAddresses is not set" in shown.out + shown.err
        with pytest.raises(FatalError, match='no support for primary IP family "IPv6"'):
            own.check(Settings(), [V4], {})

    asyncio.run(test())
