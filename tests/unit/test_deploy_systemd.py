"""The systemd unit, as systemd's own tools judge it, and the configuration that comes with it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from proxy.config.load import load

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "deploy/systemd/sluice.service"
CONFIG = ROOT / "deploy/systemd/config.yaml"

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")


def settings(name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.MULTILINE)


@needs_systemd
def test_its_exposure_stays_below_3():
    command = ["systemd-analyze", "security", "--offline=yes", "--threshold=29", str(UNIT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_systemd
def test_systemd_knows_every_setting(tmp_path):
    """The programs that it starts are not on this machine: /bin/true stands for them."""
    unit = tmp_path / UNIT.name
    unit.write_text(
        UNIT.read_text().replace("/opt/sluice/bin/sluice", "/bin/true").replace("man:sluice(8)", "man:true(1)")
    )
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
    )
    assert [line for line in done.stderr.splitlines() if UNIT.name in line] == []


def test_it_is_told_by_the_agent_that_is_watched():
    assert settings("Type") == ["notify"]
    assert settings("WatchdogSec")
    assert settings("NotifyAccess") == ["main"]


def test_restarts_that_systemd_makes_stay_below_its_own_limit():
    """An agent that fails is tried for ever; a limit that restarts could reach would leave a node without one."""
    [delay], [burst], [interval] = map(settings, ("RestartSec", "StartLimitBurst", "StartLimitIntervalSec"))
    assert (delay[-1], interval) == ("s", "1min")
    assert 60 / int(delay[:-1]) < int(burst)


def test_only_what_sets_up_the_node_has_privileges():
    """CFG-53: a plus in front of a command takes it out of the sandbox."""
    free = [each for name in ("ExecStartPre", "ExecStart", "ExecReload") for each in settings(name) if each[0] == "+"]
    assert free
    assert all(each.endswith("--init-only") for each in free)
    assert settings("CapabilityBoundingSet") == ["CAP_NET_ADMIN CAP_NET_RAW CAP_NET_BIND_SERVICE"]


def test_its_configuration_loads_without_a_warning():
    loaded = load([("config", str(CONFIG))])
    assert loaded.warnings == ()
    assert loaded.settings.manifests == "/etc/sluice/manifests"


def test_what_is_installed_is_what_was_locked():
    """deploy/requirements.lock is requirements.lock without what only builds."""

    def pins(path: str) -> set[str]:
        return {
            line.split()[0] for line in (ROOT / path).read_text().splitlines() if "==" in line and line[0].isalnum()
        }

    run, build = pins("deploy/requirements.lock"), pins("requirements.lock")
    assert run < build
    assert {each.split("==")[0] for each in build - run} >= {"hatchling", "editables"}
