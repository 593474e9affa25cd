"""A running agent with a ConfigMap for its configuration: the kubelet swaps a symbolic link, and it is another one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proxy.demo.probes import Probe
from proxy.demo.world import World
from rules.forwarding import Family, NodeFacts, SourcePrefix, parse_prefix
from tests.netns.agent import DEADLINE, Agent
from tests.netns.asking import answering, eventually, get
from tests.netns.runner import backends
from tests.scenarios.schema import CLUSTER, DIRECTORY, load, manifests, merge

# One world for all of them.
pytestmark = pytest.mark.xdist_group("agent-reload")


class ConfigMap:
    """A directory as the kubelet writes it: `config.yaml` leads through `..data` to the newest of the directories."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._count = 0
        (directory / "..0").mkdir()
        (directory / "..data").symlink_to("..0")
        (directory / "config.yaml").symlink_to("..data/config.yaml")

    def read(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self._directory / "config.yaml").read_text())
        return found

    def write(self, text: str) -> None:
        self._count += 1
        new = self._directory / f"..{self._count}"
        new.mkdir()
        (new / "config.yaml").write_text(text)
        (self._directory / "..data_tmp").symlink_to(new.name)
        (self._directory / "..data_tmp").rename(self._directory / "..data")

    def change(self, fragment: dict[str, Any]) -> None:
        self.write(json.dumps(merge(self.read(), fragment)))


@pytest.fixture(scope="module")
def reload_world(root: None) -> Iterator[World]:
    with World(prefix="sluice-reload") as world:
        yield world


@pytest.fixture
def configured(reload_world: World, mode: str, tmp_path: Path) -> Iterator[tuple[Agent, ConfigMap]]:
    """An agent that serves the Service of `external-policy-local`, and its ConfigMap."""
    configmap = ConfigMap(tmp_path)
    agent = Agent(reload_world, tmp_path, mode)
    objects = manifests(CLUSTER) + load(DIRECTORY / "external-policy-local.yaml").objects
    reload_world.probes.open(backends(objects))
    agent.configure({})
    try:
        agent.apply(objects)
        yield agent, configmap
    finally:
        if agent._process is not None and agent._process.poll() is not None:
            agent.kill()
        agent.sweep()
        reload_world.probes.shut()


def facts(agent: Agent) -> NodeFacts:
    table = agent.read(Family.IPV4)
    assert table is not None
    return table.node


def test_what_is_live_is_taken_on_without_an_end_and_without_a_failed_connection(configured, reload_world):
    """CFG-54: and a file that cannot be used changes nothing."""
    agent, configmap = configured
    process = agent.pid
    other = SourcePrefix(parse_prefix("10.244.0.0/17"))
    assert facts(agent).detector != other
    probe = Probe(host="p3", address="10.96.0.41", port=80)
    reload_world.probes.start("reload", probe, 0.005)
    configmap.change({"clusterCIDR": "10.244.0.0/17", "logging": {"verbosity": 4}})
    eventually(lambda: facts(agent).detector == other, "the other network of pods")
    configmap.write("apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: 5\n")
    eventually(lambda: "the configuration stays as it was" in agent.log.read_text(), "the line about the wrong file")
    outcomes = reload_world.probes.stop("reload")
    assert {outcome.host or str(outcome) for outcome in outcomes} == {"p1", "q1"}
    assert agent.pid == process
    assert facts(agent).detector == other
    configz = get(reload_world, "node1", "127.0.0.1", 10249, "/configz")
    assert configz is not None
    shown = json.loads(configz.body)["kubeproxy.config.k8s.io"]
    assert (shown["clusterCIDR"], shown["logging"]["verbosity"]) == ("10.244.0.0/17", 4)


def test_what_is_not_live_ends_the_agent_with_a_line_and_the_rules_stay(configured, reload_world):
    """CFG-51, CFG-54."""
    agent, configmap = configured
    before = facts(agent)
    configmap.change({"hostnameOverride": "node2", "clusterCIDR": "10.244.0.0/17"})
    process = agent._process
    assert process is not None
    assert process.wait(timeout=DEADLINE) == 1
    last = agent.log.read_text().splitlines()[-1]
    assert "the configuration file was updated: ending, to start anew with its hostnameOverride" in last
    assert facts(agent) == before
    assert answering(reload_world, "p3", "10.96.0.41", 80) == {"p1", "q1"}
