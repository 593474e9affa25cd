"""The manifests of deploy/kubernetes, as kubectl builds them, against the API server's own schema."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from proxy.config.flags import BY_NAME, normalise
from proxy.config.load import load
from proxy.config.settings import Settings

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate (the extra `test`)")

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy/kubernetes"
DATA = ROOT / "tests/data"
API_VERSION = "1.36"

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


def said(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def documents(text: str) -> list[dict[str, Any]]:
    return [each for each in yaml.safe_load_all(text) if each]


def named(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    [found] = [each for each in objects if each["kind"] == kind]
    return found


@pytest.fixture(scope="module")
def base() -> list[dict[str, Any]]:
    """What `kubectl kustomize` makes of the base; without kubectl, the files as they are."""
    if shutil.which("kubectl"):
        return documents(said("kubectl", "kustomize", DEPLOY / "base"))
    files = documents((DEPLOY / "base/kustomization.yaml").read_text())[0]["resources"]
    return [each for name in files for each in documents((DEPLOY / "base" / name).read_text())]


@pytest.fixture(scope="module")
def pod(base: list[dict[str, Any]]) -> dict[str, Any]:
    return named(base, "DaemonSet")["spec"]["template"]["spec"]


@pytest.fixture
def kubeadm() -> dict[str, Any]:
    return documents((DATA / "daemonsets/kubeadm.yaml").read_text())[0]


def schema_problem(value: dict[str, Any]) -> str:
    try:
        kubernetes_validate.validate(value, API_VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return str(error.message)
    return ""


def test_every_object_holds_against_the_schema_without_unknown_fields(base):
    assert {each["kind"] for each in base} == {"ServiceAccount", "ClusterRoleBinding", "ConfigMap", "DaemonSet"}
    assert [problem for each in base if (problem := schema_problem(each))] == []


def test_the_schema_refuses_a_field_in_the_wrong_place(base):
    daemonset = named(base, "DaemonSet")
    spec = daemonset["spec"]["template"]["spec"] | {"capabilities": {"add": ["NET_ADMIN"]}}
    assert "capabilities" in schema_problem(daemonset | {"spec": {**daemonset["spec"], "template": {"spec": spec}}})


def test_the_account_has_the_role_of_kube_proxy_and_no_other(base):
    """CFG-57."""
    account, binding = named(base, "ServiceAccount"), named(base, "ClusterRoleBinding")
    assert binding["roleRef"]["name"] == "system:node-proxier"
    assert binding["subjects"] == [
        {"kind": "ServiceAccount", "name": account["metadata"]["name"], "namespace": "kube-system"}
    ]


def test_the_agent_has_two_capabilities_and_the_privileges_end_with_the_init_container(pod):
    """CFG-53."""
    [first], [agent] = pod["initContainers"], pod["containers"]
    assert first["securityContext"] == {"privileged": True}
    assert first["args"] == ["--init-only"]
    assert first["command"] == agent["command"]
    security = agent["securityContext"]
    assert security["capabilities"] == {"drop": ["ALL"], "add": ["NET_ADMIN", "NET_RAW"]}
    assert not security["allowPrivilegeEscalation"]
    assert security["readOnlyRootFilesystem"]


def test_it_is_on_every_node_and_evicted_last(pod):
    assert pod["hostNetwork"]
    assert pod["priorityClassName"] == "system-node-critical"
    assert pod["tolerations"] == [{"operator": "Exists"}]


def test_where_the_agent_writes_there_is_something_to_write_to(pod):
    volumes = {each["name"] for each in pod["volumes"]}
    for container in pod["initContainers"] + pod["containers"]:
        assert {each["name"] for each in container["volumeMounts"]} <= volumes
    writable = {each["mountPath"] for each in pod["containers"][0]["volumeMounts"] if not each.get("readOnly")}
    assert writable == {"/run/xtables.lock", "/tmp", Settings().run_directory}


@pytest.mark.parametrize("configmap", ["ours", "kubeadm", "kind"])
def test_the_command_line_and_a_configmap_load(configmap, base, pod, kubeadm, tmp_path):
    """DESIGN 4.10: in silence, as nothing in them is unknown to us."""
    found = named(base, "ConfigMap")
    if configmap != "ours":
        found = documents((DATA / f"configmaps/{configmap}.yaml").read_text())[0]
    for name, text in found["data"].items():
        (tmp_path / name).write_text(text)
    for command in (pod["containers"][0]["command"], kubeadm["spec"]["template"]["spec"]["containers"][0]["command"]):
        words = [
            each.replace("/var/lib/kube-proxy", str(tmp_path)).replace("$(NODE_NAME)", "node1") for each in command
        ]
        assert words[0] == "/usr/local/bin/kube-proxy"
        pairs = [word.removeprefix("--").split("=", 1) for word in normalise(words[1:], set(BY_NAME))]
        loaded = load([(name, value) for name, value in pairs])
        assert loaded.warnings == ()
        assert loaded.settings.hostname_override == "node1"


@needs_kubectl
def test_the_overlay_changes_the_image_in_kubeadms_daemonset_and_nothing_else(kubeadm, tmp_path):
    overlay = tmp_path / "overlay"
    shutil.copytree(DEPLOY / "overlays/kubeadm", overlay)
    shutil.copy(DATA / "daemonsets/kubeadm.yaml", overlay / "daemonset.yaml")
    [built] = documents(said("kubectl", "kustomize", overlay))
    patched = said(
        "kubectl", "patch", "--local", "-o", "yaml",
        "-f", DATA / "daemonsets/kubeadm.yaml", "--patch-file", overlay / "image.yaml",
    )  # fmt: skip
    [container] = kubeadm["spec"]["template"]["spec"]["containers"]
    [ours] = built["spec"]["template"]["spec"]["containers"]
    assert ours["image"] != container["image"]
    container["image"] = ours["image"]
    assert built == kubeadm
    assert schema_problem(built) == ""
    assert documents(patched)[0]["spec"]["template"] == built["spec"]["template"]
