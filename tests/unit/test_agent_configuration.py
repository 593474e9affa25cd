"""A running agent and its configuration file: what it takes on, and what ends it (CFG-54)."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from proxy import agent, logs, privileged
from proxy.config.load import load
from proxy.config.schema import GROUP_VERSION, KIND, OWN_GROUP_VERSION, OWN_KIND
from proxy.config.watching import Following
from proxy.opening import FatalError
from proxy.reloading import follow
from rules.forwarding import Family, parse_address, parse_prefix
from tests.fakes.memory_dataplane import FlakyMemory
from tests.fakes.polling import eventually

HEAD = f"apiVersion: {GROUP_VERSION}\nkind: {KIND}\nmode: nftables\n"
OWN_HEAD = f"---\napiVersion: {OWN_GROUP_VERSION}\nkind: {OWN_KIND}\n"


@pytest.fixture(autouse=True)
def set_up(monkeypatch):
    """What the agent asked to be set on its node."""
    asked = []
    monkeypatch.setattr(privileged, "set_up", lambda settings, _mode: asked.append(settings) or [])
    yield asked
    logs.structlog.reset_defaults()


class Running:
    """An agent with a kernel that is a variable, and the file that it follows."""

    def __init__(self, path):
        self.path = path
        self.write(HEAD)
        again = partial(load, [("config", str(path))])
        loaded = again()
        self.following = Following(again, loaded)
        self.agent = agent._Agent(loaded.settings, "node1", [FlakyMemory(Family.IPV4)], [])
        self.agent._on_interfaces({"eth0": (parse_address("192.168.0.2"),)})

    def write(self, text):
        new = self.path.with_name("new")
        new.write_text(text)
        new.rename(self.path)

    async def facts(self):
        await self.agent._desired.refresh()
        return self.agent._desired.facts(Family.IPV4)


def run(test, tmp_path):
    async def main():
        running = Running(tmp_path / "config.yaml")
        async with asyncio.TaskGroup() as group:
            task = group.create_task(follow(running.following, running.agent._configure, running.agent._supervisor))
            await test(running)
            task.cancel()

    asyncio.run(main())


def test_what_is_live_reaches_everything_that_goes_by_it(tmp_path, set_up):
    async def test(running):
        assert (await running.facts()).service_cidrs == ()
        running.write(
            HEAD
            + "nftables: {syncPeriod: 50s, minSyncPeriod: 2s}\nclusterCIDR: 10.244.0.0/16\nlogging: {verbosity: 4}\n"
            + OWN_HEAD
            + "driftPolicy: report\nserviceCIDRs: [10.96.0.0/12]\n"
        )
        await eventually(lambda: running.agent._settings.verbosity == 4)
        facts = await running.facts()
        assert facts.service_cidrs == (parse_prefix("10.96.0.0/12"),)
        assert facts.detector is not None
        (sync,) = running.agent._syncs
        assert (sync._runner._periods.minimum, sync._runner._periods.retry, sync._policy) == (2.0, 50.0, "report")
        assert running.agent._health._timeout == 100.0
        assert running.agent._settings.configz["nftables"]["syncPeriod"] == "50s"
        assert set_up == []
        running.write(HEAD + "conntrack: {min: 7}\n")
        await eventually(lambda: set_up)
        assert set_up[0].conntrack.minimum == 7

    run(test, tmp_path)


def test_a_file_that_cannot_be_used_is_told_and_changes_nothing(tmp_path, capfd):
    logs.configure()

    async def test(running):
        before = running.agent._settings
        running.write(HEAD + "clusterCIDR: x\n")
        told = ""

        def complained():
            nonlocal told
            told += capfd.readouterr().err
            return "the configuration stays as it was" in told

        await eventually(complained)
        assert f"{running.path}:4: clusterCIDR[0]" in told
        assert running.agent._settings is before

    run(test, tmp_path)


def test_cfg_54_what_is_not_live_ends_the_agent_with_a_line_that_names_it(tmp_path):
    async def test(running):
        running.write(HEAD.replace("nftables", "iptables") + "metricsBindAddress: 127.0.0.1:7\n")
        await asyncio.Event().wait()

    with pytest.raises(ExceptionGroup) as caught:
        run(test, tmp_path)
    (error,) = caught.value.exceptions
    assert isinstance(error, FatalError)
    assert "the configuration file was updated" in str(error)
    assert "metricsBindAddress, mode" in str(error)
