"""Every scenario of tests/scenarios against the real agent and real packets."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.netns.agent import Agent
from tests.netns.runner import left_out, run
from tests.scenarios.schema import Scenario, files, in_order, load

SMOKE = frozenset(
    {
        "affinity",
        "cluster-ip",
        "external-policy-local",
        "hairpin",
        "mode-unset-loopback-listed",
        "no-endpoints",
        "protocols",
        "service-cidrs",
        "source-ranges-kinds",
    }
)
"""What `make test-vm` runs: together they use every chain, set and map of the layout."""


def load_each() -> list[tuple[str, Scenario | ValueError]]:
    """Every file's scenario by name, or what is wrong with the file: one bad file is one failure."""
    found = []
    wrong: list[tuple[str, Scenario | ValueError]] = []
    for path in files():
        try:
            found.append(load(path))
        except ValueError as error:
            wrong.append((path.stem, error))
    return wrong + [(scenario.name, scenario) for scenario in in_order(found)]


def _marks(name: str) -> tuple[pytest.MarkDecorator, ...]:
    return (pytest.mark.vm,) if name in SMOKE else ()


@pytest.mark.parametrize(
    "scenario", [pytest.param(scenario, id=name, marks=_marks(name)) for name, scenario in load_each()]
)
def test_scenario(scenario: Scenario | ValueError, agent: Agent, record_property: Callable[[str, int], None]) -> None:
    if isinstance(scenario, ValueError):
        raise scenario
    if scenario.header.only_modes and agent.mode not in scenario.header.only_modes:
        pytest.skip(f"the situation exists in mode {' or '.join(scenario.header.only_modes)} only")
    if "IPv4" not in scenario.header.families and not agent.world.ipv6:
        pytest.skip("the kernel is without IPv6")
    for capability, probes in left_out(scenario, agent).items():
        record_property(capability, probes)
    run(scenario, agent)
