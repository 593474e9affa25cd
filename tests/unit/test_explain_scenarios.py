"""Every probe of every scenario, explained from the scenario's objects alone: no kernel, no packets, any mode."""

from __future__ import annotations

import msgspec
import pytest

from proxy.config.load import load
from proxy.userspace.dataplane import CAPABILITIES
from rules.dataplane import Capabilities
from rules.forwarding import Family
from tests.netns.agent import _standard_config
from tests.scenarios.explaining import wanted, wrong_answer
from tests.scenarios.schema import CLUSTER, Scenario, after, cases, key_of, load_all, manifests, merge

MODES = {"nftables": Capabilities(), "iptables": Capabilities(), "userspace": CAPABILITIES[Family.IPV4]}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scenario", load_all(), ids=lambda scenario: scenario.name)
def test_the_explanation_of_a_probe_is_what_the_probe_expects(scenario: Scenario, mode: str, tmp_path) -> None:
    if scenario.header.only_modes and mode not in scenario.header.only_modes:
        pytest.skip("the situation does not exist in this mode")
    file = tmp_path / "config.yaml"
    config = merge(_standard_config(mode), scenario.header.config)
    if mode == "userspace":
        config["mode"] = mode  # without one, a dataplane decides and not the configuration
    file.write_bytes(msgspec.json.encode(config))
    settings = load([("config", str(file))]).settings
    base = [*(manifests(CLUSTER) if scenario.header.cluster else []), *scenario.objects]
    objects = {key_of(each): each for each in base}
    for step in scenario.steps:
        objects = after(objects, step)
        every = [case for group in step.probes for case in cases(group, mode, MODES[mode])]
        wrong = [wrong_answer(case, wanted(case, objects.values(), settings)) for case in every]
        assert not list(filter(None, wrong))
