"""One wrong input of each kind on the command line: one line that names the thing and says what to do (CFG-51).

What takes a process, a port or a privilege is in tests/netns/test_operator_mistakes.py.
"""

from __future__ import annotations

import re
import stat

import pytest

from proxy import cli
from proxy.config.schema import GROUP_VERSION, KIND

HEAD = f"apiVersion: {GROUP_VERSION}\nkind: {KIND}\n"

FILES = {
    "unknown.yaml": f"{HEAD}mod: nftables\n",
    "type.yaml": f"{HEAD}mode: [nftables]\n",
    "section.yaml": f"{HEAD}iptables: 5\n",
    "value.yaml": f"{HEAD}iptables: {{masqueradeBit: 99}}\n",
    "duration.yaml": f"{HEAD}iptables: {{syncPeriod: 5}}\n",
    "gate.yaml": f"{HEAD}featureGates: {{Foo: true}}\n",
    "locked.yaml": f"{HEAD}featureGates: {{NFTablesProxyMode: false}}\n",
    "broken.yaml": f"{HEAD}a: [b",
    "tabs.yaml": f"{HEAD}iptables:\n\tmasqueradeBit: 1\n",
    "binary.yaml": "\0\1\2",
    "empty.yaml": "",
    "list.yaml": "- a\n",
    "other.yaml": "apiVersion: v1\nkind: ConfigMap\ndata: {}\n",
    "headless.yaml": "mode: nftables\n",
}

# By a name: the command line, and a pattern for the line; {} is the directory of the files.
RUN = {
    "unknown field, strictly": (
        "--strict-config --config {}/unknown.yaml",
        "{}/unknown.yaml:3: unknown field mod; did you mean mode?",
    ),
    "wrong type": ("--config {}/type.yaml", "{}/type.yaml:3: mode: must be a string, not a list"),
    "no section": ("--config {}/section.yaml", "{}/section.yaml:3: iptables: must be a section of fields"),
    "bad value": (
        "--config {}/value.yaml",
        "{}/value.yaml:3: iptables.masqueradeBit: 99: must be within the range [0, 31]",
    ),
    "bad duration in the file": (
        "--config {}/duration.yaml",
        '{}/duration.yaml:3: iptables.syncPeriod: "5" is not a duration such as 30s or 1h30m',
    ),
    "missing file": (
        "--config {}/none",
        "--config {}/none: No such file or directory: give the path of a file that is there",
    ),
    "a directory": ("--config {}", "--config {}: Is a directory: give the path of the file in it"),
    "not YAML": ("--config {}/broken.yaml", "{}/broken.yaml:3: is not valid YAML: expected ',' or ']', but got"),
    "tabs": ("--config {}/tabs.yaml", "{}/tabs.yaml:4: is not valid YAML: found character '\\t'"),
    "not text": ("--config {}/binary.yaml", "{}/binary.yaml: is not valid YAML: unacceptable character #x0000"),
    "empty file": (
        "--config {}/empty.yaml",
        f"{{}}/empty.yaml: is empty; it needs apiVersion: {GROUP_VERSION} and kind: {KIND}",
    ),
    "a list": ("--config {}/list.yaml", "{}/list.yaml:1: is not a mapping of fields to values"),
    "another object": (
        "--config {}/other.yaml",
        f'{{}}/other.yaml:1: no kind "ConfigMap" is known in version "v1"; this reads {KIND} of {GROUP_VERSION}',
    ),
    "no kind": (
        "--config {}/headless.yaml",
        f"{{}}/headless.yaml:1: lacks apiVersion: it needs apiVersion: {GROUP_VERSION} and kind: {KIND}",
    ),
    "unknown flag": ("--proxy-mod nftables", "No such option '--proxy-mod'. Did you mean '--proxy-mode'?"),
    "unknown flag like none": ("--foo", "No such option '--foo'. (see {run} --help)"),
    "a word too much": ("foo", "Got unexpected extra argument (foo) (see {run} --help)"),
    "flag without its value": ("--config", "--config: needs a value: --config=VALUE"),
    "bad duration": ("--iptables-sync-period 5", '--iptables-sync-period: "5" is not a duration such as 30s or 1h30m'),
    "bad number": ("--v x", '--v: "x" is not a whole number'),
    "bad switch": ("--masquerade-all=maybe", '--masquerade-all: "maybe" is not true or false'),
    "bad network": ("--cluster-cidr 10.0.0.0", '--cluster-cidr[0]: "10.0.0.0": must be a valid CIDR'),
    "bad address": ("--healthz-bind-address localhost:1", '--healthz-bind-address: "localhost:1": must be a valid IP'),
    "unknown gate": (
        "--feature-gates Foo=true",
        '--feature-gates: unrecognized feature gate: "Foo"; kube-proxy 1.36 has none of that name: leave it out',
    ),
    "unknown gate in the file": (
        "--config {}/gate.yaml",
        '{}/gate.yaml:3: featureGates: unrecognized feature gate: "Foo"',
    ),
    "locked gate": ("--config {}/locked.yaml", "{}/locked.yaml:3: featureGates.NFTablesProxyMode: cannot be false"),
    "gate without its value": ("--feature-gates Foo", '--feature-gates: "Foo" lacks its value, true or false'),
    "unknown mode": ("--proxy-mode foo", '--proxy-mode: "foo": must be iptables, ipvs, nftables, userspace or blank'),
    "unknown iptables": ("--iptables-backend foo", '--iptables-backend: "foo": must be legacy or nft or blank'),
    "empty name": ("--hostname-override=\x20", "--hostname-override: empty hostname-override is invalid"),
    "nowhere to write": (
        "--write-config-to {}/none/x",
        "--write-config-to {}/none/x: No such file or directory",
    ),
    "a full disk": ("--write-config-to /dev/full", "--write-config-to /dev/full: No space left on device"),
}

VERBS = {
    "unknown verb": ("rnu", "No such command 'rnu'. Did you mean 'run'?"),
    "missing manifests": ("render -f {}/none", "{}/none: No such file or directory"),
    "neither": ("status --output foo", "Invalid value for '-o' / '--output': 'foo' is not one of 'text', 'json'."),
    "flag that needs another": (
        "verify --cluster-cidr 10.0.0.0/8",
        "--cluster-cidr says how manifests are meant: it needs -f",
    ),
    "no agent": ("status --run-directory {}", "no agent answers at {}/agent.sock: start it with sluice run"),
}


@pytest.fixture
def directory(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def words(line, directory):
    return [each.replace("{}", str(directory)).replace("\x20", " ") for each in line.split(" ") if each]


def said(capfd, expected, directory, command):
    """The one line on standard error, which begins with the command and holds what is expected."""
    shown = capfd.readouterr()
    assert shown.out == ""
    [line] = shown.err.splitlines()
    wanted = expected.replace("{run}", command).replace("{}", str(directory))
    assert line.startswith(f"{command}: "), line
    assert wanted in re.sub("  +", " ", line), line
    assert "Traceback" not in line
    assert "internal error" not in line


@pytest.mark.parametrize("name", ["kube-proxy", "sluice"])
@pytest.mark.parametrize("mistake", RUN)
def test_cfg_51_a_mistake_in_what_run_is_given_is_one_line_and_exit_code_1(mistake, name, directory, capfd):
    arguments, expected = RUN[mistake]
    given = words(arguments, directory) if mistake != "empty name" else ["--hostname-override", " "]
    first = [] if name == "kube-proxy" else ["run"]
    assert cli.main([*first, *given], name=name) == 1
    said(capfd, expected, directory, "kube-proxy" if name == "kube-proxy" else "sluice run")


@pytest.mark.parametrize("mistake", VERBS)
def test_a_mistake_in_what_other_verbs_are_given_is_one_line_and_exit_code_2(mistake, directory, capfd):
    arguments, expected = VERBS[mistake]
    given = words(arguments, directory)
    assert cli.main(given, name="sluice") == 2
    said(capfd, expected, directory, f"sluice {given[0]}" if mistake != "unknown verb" else "sluice")


def test_sluice_config_tells_the_same_mistakes(directory, capfd):
    assert cli.main(["config", "--check", "--config", f"{directory}/value.yaml"], name="sluice") == 1
    said(capfd, RUN["bad value"][1], directory, "sluice config")
    assert cli.main(["config", "--config", f"{directory}/value.yaml"], name="sluice") == 2


def test_an_unknown_field_is_one_warning(directory, capfd):
    assert cli.main(["config", "--check", "--config", f"{directory}/unknown.yaml"], name="sluice") == 0
    said(capfd, "{}/unknown.yaml:3: unknown field mod; did you mean mode?", directory, "sluice config")


def test_a_file_that_must_not_be_read_names_who_may_not(directory, capfd, monkeypatch):
    # Root may read everything, so the kernel's answer is played.
    def refuse(*_arguments, **_options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    monkeypatch.setattr("os.geteuid", lambda: 65534)
    assert cli.main(["run", "--config", "/etc/x"], name="sluice") == 1
    said(capfd, "--config /etc/x: Permission denied: let user 65534 read it", directory, "sluice run")


def test_write_config_to_leaves_the_mode_of_a_file_that_is_there(directory):
    path = directory / "written.yaml"
    path.touch(0o600)
    assert cli.main(["run", "--write-config-to", str(path)], name="sluice") == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
