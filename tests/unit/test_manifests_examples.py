"""The examples say what their table says they do."""

import re
from pathlib import Path

import pytest

from proxy.objects import Key
from proxy.sources.manifest_loading import load

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = sorted(path.name for path in EXAMPLES.glob("*.yaml"))


def service_of(loaded, name):
    (found,) = (each for each in loaded.services if each.key == Key("default", name))
    return found


def ports_of(service):
    return [(port.name, port.port, port.node_port) for port in service.spec.ports]


def backends_of(loaded, name):
    """Of each port name, the endpoints: (address, port, node)."""
    return {
        (port.name, endpoint.addresses[0], port.port, endpoint.node_name)
        for each in loaded.slices
        if each.service == Key("default", name)
        for port in each.ports
        for endpoint in each.endpoints
    }


@pytest.mark.parametrize("name", FILES)
def test_each_example_is_good_for_itself(name):
    assert not load(EXAMPLES / name).problems


def test_all_examples_are_good_together_and_in_the_table():
    loaded = load(EXAMPLES)
    assert not loaded.problems
    listed = re.findall(r"^\| \[(.*?)\]\((.*?)\)", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == [(name, name) for name in FILES]
    addresses = [each.spec.cluster_ip for each in loaded.services if each.spec.cluster_ip not in {"", "None"}]
    assert len(set(addresses)) == len(addresses)


def test_the_services_of_the_tutorials():
    loaded = load(EXAMPLES)
    external = service_of(loaded, "external-service")
    assert not external.spec.selector
    assert backends_of(loaded, "external-service") == {("", "11.11.11.11", 80, ""), ("", "22.22.22.22", 80, "")}

    redis = service_of(loaded, "redis-svc")
    assert (redis.spec.cluster_ip, ports_of(redis)) == ("10.97.97.97", [("", 6379, 0)])
    assert {port for _, _, port, _ in backends_of(loaded, "redis-svc")} == {6379}

    kubia = service_of(loaded, "kubia")
    assert ports_of(kubia) == [("http", 80, 0), ("https", 443, 0)]
    assert {(name, port) for name, _, port, _ in backends_of(loaded, "kubia")} == {("http", 8080), ("https", 8443)}

    assert ports_of(service_of(loaded, "kubia-nodeport")) == [("", 80, 30123)]

    influxdb = service_of(loaded, "influxdb")
    assert (influxdb.spec.cluster_ip, influxdb.spec.type) == ("10.97.121.42", "LoadBalancer")
    assert [each.ip for each in influxdb.status.load_balancer.ingress] == ["10.13.242.236"]
    assert ports_of(influxdb) == [("", 8086, 30051)]


def test_services_without_rules():
    loaded = load(EXAMPLES)
    assert service_of(loaded, "kubia-headless").spec.cluster_ip == "None"
    assert service_of(loaded, "external-name").spec.type == "ExternalName"
    assert not backends_of(loaded, "kubia-headless")


def test_local_policy_has_one_pod_here_and_two_there():
    loaded = load(EXAMPLES)
    local = service_of(loaded, "kubia-local")
    assert local.spec.external_traffic_policy == "Local"
    nodes = sorted(node for *_, node in backends_of(loaded, "kubia-local"))
    assert nodes == ["node1", "node2", "node2"]
    assert [node.metadata.name for node in loaded.nodes] == ["node1", "node2"]
