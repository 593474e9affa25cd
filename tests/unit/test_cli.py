"""The command line: what scripts depend on (DESIGN 5), and that no mistake ends in a trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from proxy import cli, logs
from proxy.config import flags

ROOT = Path(__file__).parents[2]
HEAVY = ("pyroute2", "aiohttp", "rich", "prometheus_client", "kubernetes", "structlog", "asyncio", "yaml", "ryaml")


@pytest.fixture(autouse=True)
def _logs():
    yield
    logs.structlog.reset_defaults()


@pytest.fixture
def agent(monkeypatch):
    """Stands in for the agent: keeps the settings that it was started with."""
    started = []
    module = types.ModuleType("proxy.agent")
    module.main = lambda settings, *_more: started.append(settings) or 0
    monkeypatch.setattr("proxy.sources.credentials_reading.Reading", lambda *_arguments: None)
    monkeypatch.setitem(sys.modules, "proxy.agent", module)
    monkeypatch.setattr("proxy.agent", module, raising=False)
    return started


def run_python(code, *args, **options):
    return subprocess.run(
        [sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True, check=False, **options
    )


@pytest.mark.parametrize("arguments", [["--help"], ["version"], ["--version"], ["run", "--help"], ["dump", "--help"]])
def test_help_and_version_load_nothing_heavy(arguments):
    code = (
        "import sys; from proxy.cli import main; code = main(sys.argv[1:]);"
        f"sys.exit(str([each for each in {HEAVY} if each in sys.modules]) if code == 0 else 'code')"
    )
    ended = run_python(code, *arguments)
    assert ended.stderr == "[]\n"
    assert ended.stdout


def test_render_needs_neither_network_nor_netlink(tmp_path):
    (tmp_path / "a.yaml").write_text("apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {clusterIP: None}\n")
    code = (
        "import sys; from proxy.cli import main; code = main(['render', '-f', sys.argv[1], '-o', 'json']);"
        "sys.exit(str([each for each in ('pyroute2', 'aiohttp') if each in sys.modules]))"
    )
    assert run_python(code, str(tmp_path)).stderr == "[]\n"


def test_help_lists_the_verbs_that_exist(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for verb in cli.sluice.commands:
        assert f"\n  {verb} " in out
    assert {"run", "demo", "render", "dump", "explain", "verify", "status", "config", "cleanup"} <= set(
        cli.sluice.commands
    )


def test_cfg_2_the_help_of_run_has_every_flag(capsys):
    assert cli.main(["run", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"--{name}" in out for name in flags.BY_NAME)


def test_run_hands_the_settings_to_the_agent(agent, capfd):
    assert cli.main(["run", "--proxy_mode", "nftables", "--masquerade-all", "-v=4", "--manifests=/m"]) == 0
    (settings,) = agent
    assert (settings.mode, settings.masquerade_all, settings.verbosity, settings.manifests) == (
        "nftables",
        True,
        4,
        "/m",
    )
    assert capfd.readouterr().err == ""


@pytest.fixture
def set_up(monkeypatch):
    """The configurations by which the node was set up."""
    done = []
    monkeypatch.setattr("proxy.privileged.set_up_or_tell", lambda settings, *_more: done.append(settings))
    return done


def test_cfg_50_a_configuration_is_checked_before_anything_is_done_by_it(agent, set_up, tmp_path):
    written = tmp_path / "written.yaml"
    for action in ([f"--write-config-to={written}"], ["--init-only"], []):
        assert cli.main(["--proxy-mode=carrier-pigeon", *action], name="kube-proxy") == 1
        assert cli.main([f"--config={tmp_path}/nothing.yaml", *action], name="kube-proxy") == 1
        assert cli.main(["--feature-gates=NoSuch=true", *action], name="kube-proxy") == 1
    assert (written.exists(), set_up, agent) == (False, [], [])


def test_cfg_50_51_53_each_action_ends_before_the_next_and_with_0(agent, set_up, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("proxy.cleanup.main", lambda _whose: pytest.fail("it cleans up"))
    written = tmp_path / "written.yaml"
    assert cli.main(["--version", f"--write-config-to={written}", "--init-only"], name="kube-proxy") == 0
    assert capsys.readouterr().out.startswith("sluice ")
    assert not written.exists()
    write = f"--write-config-to={written}"
    assert cli.main([write, "--cleanup", "--init-only", "--conntrack-min=7"], name="kube-proxy") == 0
    assert yaml.safe_load(written.read_text())["conntrack"]["min"] == 7
    assert (set_up, agent) == ([], [])
    assert cli.main(["--init-only", "--conntrack-min=7"], name="kube-proxy") == 0
    assert [each.conntrack.minimum for each in set_up] == [7]
    assert agent == []


@pytest.mark.parametrize("name", ["kube-proxy", "sluice"])
def test_cfg_1_arguments_that_are_empty_are_none(name, agent):
    """A DaemonSet's `$(EXTRA_ARGS)` with nothing in it."""
    words = ["", "--manifests", "/m", "--bind-address", "", ""]
    assert cli.main(words if name == "kube-proxy" else ["run", *words], name=name) == 0
    assert agent[0].manifests == "/m"
    assert cli.main(["--", "", "x"], name="kube-proxy") == 1


def test_run_ends_with_the_agents_code(monkeypatch, agent):
    monkeypatch.setattr(sys.modules["proxy.agent"], "main", lambda *_arguments: 1)
    assert cli.main(["run"]) == 1


def test_run_tells_warnings_in_the_log(agent, capfd):
    assert cli.main(["run", "--kube-api-content-type=x", "--logging-format=json"]) == 0
    assert (
        '"event": "--kube-api-content-type has no effect: the API server is spoken to in JSON"'
        in capfd.readouterr().err
    )


def test_under_the_name_kube_proxy_it_is_run(agent, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: iptables\n")
    arguments = [f"--config={config}", "--hostname-override=Node1"]
    assert cli.main(arguments, name="/usr/local/bin/kube-proxy") == 0
    assert (agent[0].mode, agent[0].hostname_override) == ("iptables", "node1")


def test_kubeadms_command_line_and_configmap_start_it_unchanged(agent, tmp_path, capfd):
    # The command of the DaemonSet that kubeadm makes.
    config_map = yaml.safe_load((ROOT / "tests/data/configmaps/kubeadm.yaml").read_text())
    config = tmp_path / "config.conf"
    config.write_text(config_map["data"]["config.conf"])
    assert cli.main([f"--config={config}", "--hostname-override=n1"], name="/usr/local/bin/kube-proxy") == 0
    assert (agent[0].kubeconfig, agent[0].config) == ("/var/lib/kube-proxy/kubeconfig.conf", str(config))
    assert capfd.readouterr().err == ""


def test_under_the_name_kube_proxy_help_and_mistakes_go_by_that_name(agent, capsys):
    assert cli.main(["-h"], name="kube-proxy") == 0
    assert capsys.readouterr().out.startswith("Usage: kube-proxy [OPTIONS]\n")
    assert cli.main(["run", "--nope"], name="kube-proxy") == 1
    assert capsys.readouterr().err.startswith("kube-proxy: No such option")
    assert cli.main(["dump"], name="kube-proxy") == 1  # no verb of ours, but a positional argument (CFG-1)
    assert capsys.readouterr().err.startswith("kube-proxy: Got unexpected extra argument (dump)")


def test_a_link_by_the_name_kube_proxy_is_enough(tmp_path):
    link = tmp_path / "kube-proxy"
    link.symlink_to(Path(sys.executable).parent / "sluice")
    written = tmp_path / "config.yaml"
    ended = subprocess.run(
        [link, "--proxy-mode", "ipvs", f"--write-config-to={written}"], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert yaml.safe_load(written.read_text())["mode"] == "ipvs"


@pytest.mark.parametrize("arguments", [["--version"], ["--version=raw"]])
def test_cfg_1_kube_proxys_version_flag(arguments, capsys, agent):
    assert cli.main(arguments, name="kube-proxy") == 0
    assert capsys.readouterr().out.startswith("sluice ")
    assert agent == []


def test_cfg_2_write_config_to_writes_what_loads_again(agent, tmp_path):
    path = tmp_path / "out.yaml"
    arguments = ["run", "--proxy-mode=nftables", "--cluster-cidr=10.0.0.0/8", f"--write-config-to={path}"]
    assert cli.main(arguments) == 0
    assert yaml.safe_load(path.read_text())["nftables"]["syncPeriod"] == "30s"
    assert cli.main(["run", f"--config={path}"]) == 0
    assert (agent[0].mode, [str(each) for each in agent[0].cluster_cidrs]) == ("nftables", ["10.0.0.0/8"])
    assert len(agent) == 1


def test_cfg_53_init_only_ends(agent, capfd, monkeypatch):
    monkeypatch.setattr("proxy.privileged.set_up", lambda *_: ["--init-only tried it"])
    assert cli.main(["run", "--init-only"]) == 0
    assert agent == []
    assert "--init-only" in capfd.readouterr().err


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (2, 1)])
def test_cfg_52_run_cleanup_is_cleanup(monkeypatch, agent, code, expected):
    monkeypatch.setattr("proxy.cleanup.main", lambda _whose: code)
    assert cli.main(["run", "--cleanup"]) == expected
    assert agent == []


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["run", "--nope"], 1, "sluice run: No such option"),
        (["run", "positional"], 1, "sluice run: Got unexpected extra argument (positional)"),
        (["run", "--config"], 1, "sluice run: --config: needs a value"),
        (["run", "--config=/none"], 1, "sluice run: --config /none: No such file or directory"),
        (["run", "--v=x"], 1, 'sluice run: --v: "x" is not a whole number'),
        (["run", "--cleanup=x"], 1, 'sluice run: --cleanup: "x" is not true or false'),
        (["run", "--write-config-to=/none/x"], 1, "sluice run: --write-config-to /none/x: No such file or directory"),
        (["render"], 2, "sluice render: Missing option '-f'"),
        (["render", "-f", "/none"], 2, "sluice render: /none"),
        (["render", "-f", ".", "--masquerade-all=x"], 2, "sluice render: --masquerade-all:"),
        (["render", "-f", ".", "-o", "xml"], 2, "sluice render: Invalid value for '-o'"),
        (["dump", "--address", "x"], 2, "sluice dump: --address: 'x' is no IP address"),
        (["dump", "--port", "0"], 2, "sluice dump: Invalid value for '--port'"),
        (["nope"], 2, "sluice: No such command 'nope'"),
    ],
)
def test_mistakes_are_one_line_and_a_code(agent, capsys, arguments, code, line):
    assert cli.main(arguments) == code
    err = capsys.readouterr().err
    assert err.startswith(line)
    assert len(err.splitlines()) == 1
    assert agent == []


def test_cfg_20_every_mistake_of_a_file_is_a_line(capsys, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: x\noomScoreAdj: 5000\n"
    )
    assert cli.main(["run", f"--config={config}"]) == 1
    assert [line.split(": ")[1] for line in capsys.readouterr().err.splitlines()] == [f"{config}:3", f"{config}:4"]


def test_config_prints_the_effective_configuration_with_origins(capsys, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: nftables\n")
    assert cli.main(["config", "--config", str(config), "--hostname-override=n1"]) == 0
    out = capsys.readouterr().out
    first, second = yaml.safe_load_all(out)
    assert (first["mode"], first["nodePortAddresses"], second["driftPolicy"]) == ("nftables", ["primary"], "repair")
    assert f"# file {config}:3\n" in out
    assert "# flag --hostname-override\n" in out
    assert cli.main(["config", "--config", str(config), "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["origins"]["nodePortAddresses"] == {"kind": "mode", "where": "nftables"}


def test_config_check_says_nothing_of_a_good_file_and_ends_with_1_for_a_bad_one(capsys, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmod: nftables\n")
    assert cli.main(["config", "--check", f"--config={config}"]) == 0
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", f"sluice config: {config}:3: unknown field mod; did you mean mode?\n")
    assert cli.main(["config", "--check", f"--config={config}", "--strict-config"]) == 1
    assert capsys.readouterr().err == told.err
    assert cli.main(["config", f"--config={config}", "--strict-config"]) == 2


def test_cfg_2_write_config_to_has_our_own_settings_in_a_second_document(agent, tmp_path):
    path = tmp_path / "out.yaml"
    assert cli.main(["run", "--drift-policy=report", f"--write-config-to={path}"]) == 0
    first, second = yaml.safe_load_all(path.read_text())
    assert (first["kind"], second["driftPolicy"]) == ("KubeProxyConfiguration", "report")


def test_an_internal_error_is_one_line_and_a_trace_on_request(monkeypatch, capsys, agent):
    def broken(*_arguments):
        raise KeyError("x\ny")

    monkeypatch.setattr(sys.modules["proxy.agent"], "main", broken)
    assert cli.main(["run"]) == 1
    assert capsys.readouterr().err == "sluice run: internal error: KeyError: 'x\\ny' (SLUICE_TRACEBACK=1 shows where)\n"
    monkeypatch.setenv(cli.TRACEBACK, "1")
    with pytest.raises(KeyError):
        cli.main(["run"])


def test_c_is_no_mistake(monkeypatch, agent, capsys):
    def interrupted(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["proxy.agent"], "main", interrupted)
    assert cli.main(["run"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_mistake(tmp_path):
    spec = "{clusterIP: 10.0.%d.%d, ports: [{port: 1}]}"
    services = [
        f"apiVersion: v1\nkind: Service\nmetadata: {{name: s{each}}}\nspec: {spec % divmod(each, 250)}\n"
        for each in range(1000)
    ]
    manifests = tmp_path / "m.yaml"
    manifests.write_text("---\n".join(services))
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "proxy", "render", "-f", str(manifests), "-o", "json"],
            cwd=ROOT,
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, "")


words = st.text(max_size=10) | st.sampled_from(
    [f"--{name}" for name in flags.BY_NAME if name not in {"cleanup", "write-config-to", "config"}]
)


@given(verb=st.sampled_from(["run", "render", ""]), arguments=st.lists(words, max_size=5))
def test_no_arguments_end_in_a_trace(monkeypatch_module, verb, arguments):
    assert cli.main([*filter(None, [verb]), *arguments]) in {0, 1, 2}


@pytest.fixture(scope="module")
def monkeypatch_module():
    """For generated arguments: whatever the agent is asked to do, it ends at once."""
    with pytest.MonkeyPatch.context() as patch:
        module = types.ModuleType("proxy.agent")
        module.main = lambda *_arguments: 0
        patch.setattr("proxy.sources.credentials_reading.Reading", lambda *_arguments: None)
        patch.setitem(sys.modules, "proxy.agent", module)
        patch.setattr("proxy.agent", module, raising=False)
        for verb in ("proxy.cleanup.main", "proxy.dump.main"):
            patch.setattr(verb, lambda *_args, **_kwargs: 0)
        patch.setattr(cli, "_explain", lambda error, _command: fail_if_internal(error))
        yield


def fail_if_internal(error):
    if not isinstance(error, cli.click.ClickException | cli.ConfigError | OSError):
        raise error
    return ()
