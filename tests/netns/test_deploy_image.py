"""The container image, run as a kubelet would run it for a DaemonSet, on node1 of a world with an API server.

SLUICE_IMAGE_ROOT names the image's root file system (`buildah mount`).  The pods of both DaemonSets, ours and
kubeadm's, become configurations for crun: command line, environment, capabilities, mounts and read-only root come from
the manifest.  What is left out: seccomp's default profile, and cgroups.

Without an image this checkout is run, by the exact command line and ConfigMaps of kubeadm, in a mount namespace.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from proxy.demo.world import World
from proxy.modes import open_dataplane
from rules.forwarding import Family
from tests.fakes.apiserver import FakeApiServer
from tests.fakes.certificates import Authority
from tests.netns.api_feed import ApiFeed
from tests.netns.asking import answering, eventually, get, said
from tests.netns.runner import backends
from tests.scenarios.schema import CLUSTER, DIRECTORY, load, manifests

ROOT = Path(__file__).parents[2]
IMAGE = os.environ.get("SLUICE_IMAGE_ROOT", "")
TOKEN = "the-token-of-node1"
SERVER = "10.0.0.2"
"""Where the ConfigMap of kubeadm expects the API server."""
DEFAULT_CAPABILITIES = {
    *("CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID", "SETFCAP", "SETPCAP"),
    *("NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE"),
}
"""What container runtimes leave to root."""

pytestmark = [pytest.mark.netns, pytest.mark.xdist_group("deploy")]
needs_image = pytest.mark.skipif(not IMAGE, reason="SLUICE_IMAGE_ROOT says what is to be run")
needs_crun = pytest.mark.skipif(shutil.which("crun") is None, reason="crun is not installed")


def held() -> set[str]:
    """What this process may do, which is less than everything in some virtual machines."""
    [line] = [each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith("CapEff:")]
    names = subprocess.run(["capsh", f"--decode={line.split()[1]}"], check=True, capture_output=True, text=True)
    return set(names.stdout.strip().partition("=")[2].upper().split(","))


def capabilities(security: dict[str, Any]) -> list[str]:
    if security.get("privileged"):
        return sorted(held())
    given = security.get("capabilities", {})
    kept = set() if "ALL" in given.get("drop", []) else DEFAULT_CAPABILITIES
    return [f"CAP_{name}" for name in {*kept, *given.get("add", [])}]


class Pod:
    """What the kubelet prepares: volumes, and a configuration for each container."""

    def __init__(self, spec: dict[str, Any], configmap: dict[str, Any], netns: str, directory: Path) -> None:
        self._spec = spec
        self._netns = netns
        self._directory = directory
        self.name = f"sluice-{os.getpid()}-{directory.name}"
        for part in ("account", "volumes"):
            (directory / part).mkdir()
        self._volumes = {each["name"]: self._volume(each, configmap) for each in spec["volumes"]}

    def give_account(self, token: str, authority: Path) -> None:
        (self._directory / "account/token").write_text(token)
        shutil.copy(authority, self._directory / "account/ca.crt")

    def command(self, container: dict[str, Any]) -> list[str]:
        bundle = self._directory / container["name"]
        bundle.mkdir()
        (bundle / "config.json").write_text(json.dumps(self._configuration(container)))
        # crun refuses a host that has both versions of cgroups: it is shown one, and uses none.
        hide = 'umount --lazy /sys/fs/cgroup/unified 2>/dev/null; exec crun --cgroup-manager=disabled run --bundle "$@"'
        return ["unshare", "--mount", "sh", "-c", hide, "sh", str(bundle), f"{self.name}-{container['name']}"]

    def _volume(self, volume: dict[str, Any], configmap: dict[str, Any]) -> Path:
        where = self._directory / "volumes" / volume["name"]
        if "hostPath" in volume and volume["hostPath"].get("type") == "FileOrCreate":
            where.touch()  # the host's own lock is not touched
            return where
        where.mkdir()
        if "configMap" in volume:
            assert volume["configMap"]["name"] == configmap["metadata"]["name"]
            for name, text in configmap["data"].items():
                (where / name).write_text(text)
        return where

    def _configuration(self, container: dict[str, Any]) -> dict[str, Any]:
        security = container["securityContext"]
        privileged = security.get("privileged", False)
        environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        for each in container.get("env", []):
            assert each["valueFrom"]["fieldRef"]["fieldPath"] == "spec.nodeName"
            environment[each["name"]] = "node1"
        words = [*container["command"], *container.get("args", [])]
        for name, value in environment.items():
            words = [each.replace(f"$({name})", value) for each in words]
        allowed = capabilities(security)
        system = [
            ("proc", "/proc", "proc", []),
            ("tmpfs", "/dev", "tmpfs", ["nosuid", "mode=755"]),
            ("shm", "/dev/shm", "tmpfs", ["nosuid", "noexec", "nodev", "mode=1777"]),
            ("sysfs", "/sys", "sysfs", ["nosuid", "noexec", "nodev", "rw" if privileged else "ro"]),
        ]
        mounts = [
            {"source": source, "destination": where, "type": kind, "options": options}
            for source, where, kind, options in system
        ]
        volumes = [(str(self._directory / "account"), "/var/run/secrets/kubernetes.io/serviceaccount", True)]
        volumes += [
            (str(self._volumes[each["name"]]), each["mountPath"], each.get("readOnly", False))
            for each in container["volumeMounts"]
        ]
        mounts += [
            {"source": source, "destination": where, "type": "none", "options": ["rbind", "ro" if read_only else "rw"]}
            for source, where, read_only in volumes
        ]
        return {
            "ociVersion": "1.0.2",
            "hostname": "node1",
            "root": {"path": IMAGE, "readonly": security.get("readOnlyRootFilesystem", False)},
            "mounts": mounts,
            "process": {
                "args": words,
                "cwd": "/",
                "env": [f"{name}={value}" for name, value in environment.items()],
                "user": {"uid": 0, "gid": 0},
                "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), allowed),
                "noNewPrivileges": not security.get("allowPrivilegeEscalation", True),
            },
            "linux": {
                "namespaces": [
                    *({"type": each} for each in ("mount", "pid", "ipc", "uts")),
                    {"type": "network", "path": self._netns},
                ],
                "readonlyPaths": [] if privileged else ["/proc/sys", "/proc/sysrq-trigger", "/proc/irq", "/proc/bus"],
                "maskedPaths": [] if privileged else ["/proc/kcore", "/proc/keys", "/sys/firmware"],
            },
        }

    def run(self) -> subprocess.Popen[Any]:
        """Run the init containers, and start the container; its log is in `log`."""
        for each in self._spec.get("initContainers", []):
            done = subprocess.run(self.command(each), capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        [container] = self._spec["containers"]
        self.log = self._directory / "log"
        with self.log.open("wb") as log:
            return subprocess.Popen(self.command(container), stdout=log, stderr=subprocess.STDOUT)


def objects_of(path: str) -> list[dict[str, Any]]:
    return [each for each in yaml.safe_load_all((ROOT / path).read_text()) if each]


@pytest.fixture(scope="module")
def cluster(root: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, Authority]]:
    """A world whose API server is where kubeadm's ConfigMap says, with Services in it and servers behind them."""
    directory = tmp_path_factory.mktemp("image")
    with World(prefix="sluice-image") as world:
        said(world, "ip", "address", "add", f"{SERVER}/32", "dev", "lo")
        feed = ApiFeed(world, directory)
        authority = Authority(directory, "of-the-cluster")
        feed.server = FakeApiServer(
            listen=(SERVER, 6443),
            tokens={TOKEN: "system:serviceaccount:kube-system:kube-proxy"},
            tls=authority.serving(authority.server(f"IP:{SERVER}")),
        )
        with feed:
            objects = manifests(CLUSTER) + load(DIRECTORY / "external-policy-local.yaml").objects
            world.probes.open(backends(objects))
            feed.publish(objects)
            yield world, authority


KUBEADM = ("tests/data/daemonsets/kubeadm.yaml", "tests/data/configmaps/kubeadm.yaml")
OURS = ("deploy/kubernetes/base/daemonset.yaml", "deploy/kubernetes/base/configmap.yaml")


IN_PLACE = """
set -e
for each in /var/lib /run /usr/local/bin; do mount -t tmpfs none $each; done
mkdir -p /var/lib/kube-proxy /var/run/secrets/kubernetes.io
cp "$1"/config/* /var/lib/kube-proxy
cp -r "$1/account" /var/run/secrets/kubernetes.io/serviceaccount
ln -s "$2" /usr/local/bin/kube-proxy
shift 2
exec "$@"
"""
"""In a mount namespace of its own: what the kubelet mounts, and the program where the image has it."""


@pytest.mark.parametrize("name", ["kubeadm", "kind"])
def test_kubeadms_command_line_and_the_configmaps_of_kubeadm_and_kind_start_it_unchanged(name, cluster, tmp_path):
    """DESIGN 4.10: every word of the command line, and every byte of the ConfigMap but the server's address."""
    world, authority = cluster
    [daemonset] = objects_of("tests/data/daemonsets/kubeadm.yaml")
    [configmap] = objects_of(f"tests/data/configmaps/{name}.yaml")
    (tmp_path / "config").mkdir()
    for file, text in configmap["data"].items():
        (tmp_path / "config" / file).write_text(re.sub(r"server: https://\S+", f"server: https://{SERVER}:6443", text))
    (tmp_path / "account").mkdir()
    (tmp_path / "account/token").write_text(TOKEN)
    shutil.copy(authority.pair.certificate, tmp_path / "account/ca.crt")
    [container] = daemonset["spec"]["template"]["spec"]["containers"]
    command = [word.replace("$(NODE_NAME)", "node1") for word in container["command"]]
    assert command[0] == "/usr/local/bin/kube-proxy"
    program = Path(sys.executable).with_name("kube-proxy")
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = world.start(
            "node1",
            ["unshare", "--mount", "sh", "-c", IN_PLACE, "sh", str(tmp_path), str(program), *command],
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        eventually(lambda: answering(world, "p3", "10.96.0.41", 80) == {"p1", "q1"}, "the Service's answer")
        assert answering(world, "c", "203.0.113.30", 80) == {"p1"}
        for port, path, body in ((10256, "/healthz", '"healthy":true'), (10249, "/proxyMode", "iptables")):
            eventually(lambda port=port, path=path: get(world, "node1", "127.0.0.1", port, path), f"port {port}")
            reply = get(world, "node1", "127.0.0.1", port, path)
            assert reply is not None
            assert (reply.status, body in reply.body) == (200, True), reply.body
    finally:
        process.terminate()
        process.wait(60)
        cleanup(world)
    text = log.read_text()
    assert process.returncode == 0, text
    assert "Traceback" not in text
    warned = [line for line in text.splitlines() if " warning " in line or " error " in line]
    # What another network namespace may not set, what kube-proxy warns of as well (CFG-58), and the scenario's Service.
    expected = ("not set up as configured", "nodePortAddresses is not set", "spec.healthCheckNodePort is 0")
    assert [line for line in warned if not any(each in line for each in expected)] == []


@needs_image
@needs_crun
@pytest.mark.parametrize("mode", ["", "nftables", "iptables"])
@pytest.mark.parametrize("files", [KUBEADM, OURS], ids=["kubeadm", "ours"])
def test_the_image_serves_by_the_command_line_and_configmap(files, mode, cluster, tmp_path):
    """DESIGN 4.10; the second DaemonSet's container has NET_ADMIN and NET_RAW, and a root that it cannot write to."""
    world, authority = cluster
    [daemonset], [configmap] = map(objects_of, files)
    configured = (
        configmap["data"]["config.conf"]
        .replace('mode: ""', f'mode: "{mode}"')
        .replace("mode: nftables", f'mode: "{mode}"')
    )
    if files is OURS:
        # The kubelet's share, and a setting that only the machine's own network namespace has.
        configured = configured.replace("oomScoreAdj: -997", "oomScoreAdj: 0\nconntrack: {maxPerCore: 0}")
    configmap["data"]["config.conf"] = configured
    configmap["data"]["kubeconfig.conf"] = configmap["data"]["kubeconfig.conf"].replace("control-plane.example", SERVER)
    pod = Pod(daemonset["spec"]["template"]["spec"], configmap, str(world.namespaces["node1"].path), tmp_path)
    pod.give_account(TOKEN, authority.pair.certificate)
    process = pod.run()
    try:
        eventually(lambda: answering(world, "p3", "10.96.0.41", 80) == {"p1", "q1"}, "the Service's answer")
        assert answering(world, "c", "203.0.113.30", 80) == {"p1"}
        health = get(world, "node1", "127.0.0.1", 10256, "/healthz")
        assert health is not None
        assert health.status == 200, health.body
        shown = get(world, "node1", "127.0.0.1", 10249, "/proxyMode")
        assert shown is not None
        assert shown.body == (mode or "iptables")
        assert "Traceback" not in (log := pod.log.read_text())
        if files is OURS:
            assert "not set up as configured" not in log
    finally:
        subprocess.run(["crun", "kill", f"{pod.name}-kube-proxy", "TERM"], check=False)
        process.wait(60)
    assert process.returncode == 0
    assert answering(world, "p3", "10.96.0.41", 80) == {"p1", "q1"}  # the rules stay
    cleanup(world)


def cleanup(world: World) -> None:
    for name in ("nftables", "iptables"):
        for family in Family:
            dataplane = world.namespaces["node1"].inside(lambda name=name, family=family: open_dataplane(name, family))
            try:
                world.namespaces["node1"].inside(dataplane.cleanup)
            finally:
                dataplane.close()


@needs_image
def test_the_image_has_both_kinds_of_iptables_and_no_compiler():
    programs = {each.name for where in ("usr/bin", "usr/sbin") for each in (Path(IMAGE) / where).iterdir()}
    assert programs >= {"iptables-legacy-restore", "iptables-nft-restore", "ip6tables-legacy-save", "nft", "modprobe"}
    assert not programs & {"gcc", "cc", "ld", "make", "pip", "pip3", "as"}


@needs_image
def test_the_image_says_what_is_in_it():
    """Every distribution of the lock is there, in the version of the lock, and our own; nothing else of Python's."""
    components = json.loads((Path(IMAGE) / "usr/share/sluice/sbom.cdx.json").read_text())["components"]
    python = {
        each["name"].lower().replace("_", "-"): each["version"] for each in components if "pkg:pypi" in each["purl"]
    }
    lock = [
        line.split()[0]
        for line in (ROOT / "deploy/requirements.lock").read_text().splitlines()
        if "==" in line and "win32" not in line
    ]
    wanted = dict(each.split("==") for each in lock)
    assert python.pop("sluice-proxy") in (ROOT / "pyproject.toml").read_text()
    assert python == wanted
    assert any(each["name"] == "iptables" for each in components)
