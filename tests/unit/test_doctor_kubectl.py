"""The kubectl plugin, with a kubectl that notes what it is asked."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

PLUGIN = Path(__file__).parents[2] / "deploy" / "kubectl-sluice"
FAKE = """#!/bin/sh
{ printf 'CALL'; for each in "$@"; do printf '|%s' "$each"; done; printf '\\n'; } >> "$CALLS"
case " $* " in
*" config view "*) printf '%s' "$CURRENT" ;;
*" get pods "*) printf '%b' "$PODS" ;;
*" exec "*) echo answered; exit "$CODE" ;;
esac
"""


class Cluster:
    """What the plugin did, and how it ended."""

    def __init__(self, directory: Path) -> None:
        self.file = directory / "calls"
        fake = directory / "kubectl"
        fake.write_text(FAKE)
        fake.chmod(0o755)
        self.path = f"{directory}:{os.environ['PATH']}"

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        self.file.write_text("")
        values: Mapping[str, str] = {
            "PATH": self.path,
            "CALLS": str(self.file),
            "PODS": "kube-proxy-x7\\n",
            "CURRENT": "shop",
            "CODE": "0",
            **environment,
        }
        return subprocess.run(["sh", str(PLUGIN), *arguments], env=values, capture_output=True, text=True, check=False)

    @property
    def calls(self) -> list[list[str]]:
        return [line.split("|")[1:] for line in self.file.read_text().splitlines()]


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def executed(cluster: Cluster) -> list[str]:
    """The words after kubectl exec's own."""
    return cluster.calls[-1][cluster.calls[-1].index("--") + 1 :]


def test_a_verb_runs_in_the_pod_of_that_node(cluster: Cluster) -> None:
    done = cluster.run("explain", "10.96.0.10:53/udp", "--from", "pod", "--node", "n1")
    assert (done.returncode, done.stdout) == (0, "answered\n")
    listing, execution = cluster.calls
    assert listing[:5] == ["-n", "kube-system", "get", "pods", "-l"]
    assert listing[5:8] == ["k8s-app=kube-proxy", "--field-selector", "spec.nodeName=n1,status.phase=Running"]
    assert execution == [
        *("-n", "kube-system", "exec", "kube-proxy-x7", "-c", "kube-proxy", "--"),
        *("sluice", "explain", "10.96.0.10:53/udp", "--from", "pod"),
    ]


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("svc/web", "shop/web"),
        ("service/web:http", "shop/web:http"),
        ("other/svc/web", "other/web"),
        ("other/web", "other/web"),
    ],
)
def test_services_as_kubectl_names_them(asked: str, meant: str, cluster: Cluster) -> None:
    cluster.run("explain", asked, "--node=n1")
    assert executed(cluster) == ["sluice", "explain", meant]


@pytest.mark.parametrize("option", [["-n", "other"], ["--namespace", "other"], ["--namespace=other"]])
def test_a_namespace_given_as_to_kubectl(option: list[str], cluster: Cluster) -> None:
    cluster.run("explain", "svc/web", *option, "--node=n1", "--from", "node")
    assert executed(cluster) == ["sluice", "explain", "other/web", "--from", "node"]
    cluster.run("dump", *option, "--node=n1")
    assert executed(cluster) == ["sluice", "dump", *option], "dump has a namespace of its own"
    cluster.run("explain", "web", *option, "--node=n1")
    assert executed(cluster) == ["sluice", "explain", "web", "-n", "other"], "a name alone is for the verb to find out"


def test_with_a_terminal_the_verb_has_one_too(cluster: Cluster) -> None:
    import pty  # noqa: PLC0415  # this test alone needs one

    owner, terminal = pty.openpty()
    cluster.run("status", "--node=n1")
    values = {"PATH": cluster.path, "CALLS": str(cluster.file), "PODS": "kube-proxy-x7\\n", "CURRENT": "", "CODE": "0"}
    subprocess.run(["sh", str(PLUGIN), "status", "--node=n1"], env=values, stdin=terminal, stdout=terminal, check=True)
    os.close(owner)
    os.close(terminal)
    without, with_one = [call for call in cluster.calls if "exec" in call]
    assert "-it" not in without
    assert with_one[2:5] == ["exec", "-it", "kube-proxy-x7"]


def test_a_context_without_a_namespace_means_default(cluster: Cluster) -> None:
    cluster.run("explain", "svc/web", "--node=n1", CURRENT="")
    assert executed(cluster) == ["sluice", "explain", "default/web"]


def test_words_with_blanks_and_what_looks_like_a_pattern_arrive_whole(cluster: Cluster) -> None:
    cluster.run("dump", "--service", "a b", "*", "--node", "n1", "--", "--node")
    assert executed(cluster) == ["sluice", "dump", "--service", "a b", "*", "--node"]


def test_the_cluster_is_chosen_as_with_kubectl_and_the_agent_by_the_environment(cluster: Cluster) -> None:
    chosen = {"SLUICE_SELECTOR": "app=sluice", "SLUICE_NAMESPACE": "net", "SLUICE_CONTAINER": "agent"}
    cluster.run("status", "--node", "n1", "--context", "east", "--kubeconfig=/k c", **chosen)
    for call in cluster.calls:
        assert call[:4] == ["--context=east", "--kubeconfig=/k c", "-n", "net"]
    assert "app=sluice" in cluster.calls[0]
    assert cluster.calls[1][4:8] == ["exec", "kube-proxy-x7", "-c", "agent"]


def test_it_ends_as_the_verb_does(cluster: Cluster) -> None:
    assert cluster.run("doctor", "--node", "n1", CODE="1").returncode == 1


@pytest.mark.parametrize(
    ("arguments", "environment", "part"),
    [
        (["doctor"], {}, "--node NODE is missing"),
        (["doctor", "--node"], {}, "--node needs a value"),
        (["doctor", "--node", "n9"], {"PODS": ""}, "no running pod with k8s-app=kube-proxy on node n9"),
        (["cleanup", "--node", "n1"], {}, "cleanup is no question"),
        (["explain", "svc/web", "--node", "n1", "-n"], {}, "-n needs a value"),
        (["doctor", "--node", "n1", "-f", "x.yaml"], {}, "-f reads a file of this machine"),
        (["-o", "json", "doctor", "--node", "n1"], {}, "the verb comes first"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_run(
    arguments: list[str], environment: dict[str, str], part: str, cluster: Cluster
) -> None:
    done = cluster.run(*arguments, **environment)
    assert done.returncode == 2
    assert part in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not any("exec" in call for call in cluster.calls)


def test_help_asks_nobody(cluster: Cluster) -> None:
    assert "kubectl sluice VERB" in cluster.run("--help").stdout
    assert cluster.calls == []
