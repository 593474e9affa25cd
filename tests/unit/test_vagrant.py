"""The lab of virtual machines, as far as it can be looked at without machines."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from proxy.demo import plan
from tests.scenarios.schema import DIRECTORY, load
from vagrant.probing import machines, scenarios
from vagrant.probing.mirrored import SWAPS, turned, turned_round

LAB = Path(__file__).parents[2] / "vagrant"
SCRIPTS = ("build-box", "cluster/provision", "guest/provision", "host-setup", "pack", "probe")


@pytest.mark.skipif(shutil.which("vagrant") is None, reason="vagrant is not installed")
@pytest.mark.parametrize("directory", ["", "cluster"])
def test_vagrant_accepts_each_vagrantfile(directory: str, tmp_path: Path) -> None:
    # A copy, as Vagrant writes beside a Vagrantfile; and a home of its own, which it writes to as well.
    lab = tmp_path / "vagrant"
    shutil.copytree(LAB, lab, ignore=shutil.ignore_patterns(".lab", ".vagrant", "__pycache__"))
    environment = {**os.environ, "VAGRANT_HOME": str(tmp_path / "home"), "VAGRANT_CHECKPOINT_DISABLE": "1"}
    done = subprocess.run(
        ["vagrant", "validate", "--ignore-provider"],
        cwd=lab / directory,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("vagrant") is None, reason="vagrant is not installed")
def test_an_unknown_mode_is_one_line_and_no_machine(tmp_path: Path) -> None:
    shutil.copy(LAB / "Vagrantfile", tmp_path)
    environment = {**os.environ, "VAGRANT_HOME": str(tmp_path / "home"), "LAB_MODE": "ebpf"}
    done = subprocess.run(
        ["vagrant", "validate", "--ignore-provider"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "LAB_MODE=ebpf: choose one of ipvs, iptables, nftables, userspace" in done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_has_nothing_to_say_of_a_script(script: str) -> None:
    done = subprocess.run(["shellcheck", LAB / script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_can_read_a_script(script: str) -> None:
    subprocess.run(["bash", "-n", LAB / script], check=True)


def test_every_host_of_the_plan_lives_on_one_machine() -> None:
    found = [name for machine in machines.MACHINES for name in machines.namespaces(machine)]
    assert sorted(found) == sorted(plan.HOSTS)


def test_the_scenarios_of_a_run_exist() -> None:
    names = {path.stem for path in DIRECTORY.glob("*.yaml")}
    assert {*scenarios.CHOSEN, *scenarios.MIRRORED} <= names


def test_the_probes_of_a_run_come_from_a_pod_the_node_and_outside() -> None:
    kinds = set()
    for name in scenarios.CHOSEN:
        for step in load(DIRECTORY / f"{name}.yaml").steps:
            for group in scenarios.chosen_groups(step, mirrored=False):
                kinds |= {host.partition("@")[0] for host in group.from_}
    assert {"p1", "node1", "c", "x"} <= kinds
    assert not kinds & {"q1", "q2", "q3", "q4", "node2"}, "node2 has an agent of its own"


@pytest.mark.parametrize("name", scenarios.MIRRORED)
def test_a_mirrored_scenario_keeps_probes_that_the_other_node_can_make(name: str) -> None:
    groups = [
        group
        for step in load(DIRECTORY / f"{name}.yaml").steps
        for group in scenarios.chosen_groups(step, mirrored=True)
    ]
    assert groups
    for group in groups:
        assert all(turned(host) != host for host in group.from_), "clients' packets pass node1"


def test_turning_twice_is_no_turn() -> None:
    for text in (*SWAPS, "192.168.50.100", "c", "10.96.0.41"):
        assert turned(turned(text)) == text


def test_objects_are_turned_wherever_a_node_is_named() -> None:
    endpoint = {"addresses": ["10.244.1.11"], "nodeName": "node1", "conditions": {"ready": True}}
    assert turned_round({"endpoints": [endpoint]}) == {
        "endpoints": [{"addresses": ["10.244.2.11"], "nodeName": "node2", "conditions": {"ready": True}}]
    }
