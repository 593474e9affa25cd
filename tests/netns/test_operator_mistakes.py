"""An agent that is started where something is wrong: one line that names it and says what to do (CFG-51).

Each case is a process on the command line, in a network namespace of its own.  What is wrong with the command line and
the files themselves is in tests/unit/test_operator_mistakes.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.server
import json
import os
import re
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.certificates import Authority
from tests.netns.agent import DEADLINE
from tests.netns.isolation import own_network_namespace

TOKEN = "the-secret-token"
PRIVILEGES = "--bounding-set={0} --inh-caps={0} --ambient-caps={0}"
NOBODY = "setpriv --reuid 65534 --regid 65534 --clear-groups"
QUIET = (
    "--conntrack-max-per-core=0 --conntrack-min=0 --conntrack-tcp-timeout-established=0 --nodeport-addresses=primary "
    "--conntrack-tcp-timeout-close-wait=0 --hostname-override=node1 "
    f"--oom-score-adj={Path('/proc/self/oom_score_adj').read_text().strip()}"
)
"""What asks for nothing of the machine that the tests run on."""


class Started:
    """A process of the command line, and the lines that it writes."""

    def __init__(self, directory: Path, arguments: str, before: Sequence[str] = (), program: str = "") -> None:
        own = f"--run-directory={directory}/run {arguments}".split()
        self.log = directory / f"log-{len(list(directory.glob('log-*')))}"
        with self.log.open("wb") as log:
            # `-m proxy` is this checkout's own; a program stands beside the interpreter.
            ours = [str(Path(sys.executable).with_name(program))] if program else [sys.executable, "-m", "proxy"]
            command = [*before, *ours, "run", *own]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def lines(self, *levels: str) -> list[str]:
        """What was written, without times; of some levels only."""
        lines = [re.sub(r"^\S+Z ", "", line) for line in self.log.read_text().splitlines()]
        return [line for line in lines if not levels or line.split(" ")[0] in levels]

    def wait_for(self, pattern: str) -> None:
        """Wait for a line that holds a pattern."""
        deadline = time.monotonic() + DEADLINE
        while not re.search(pattern, self.log.read_text()):
            assert self.process.poll() is None, f"it ended:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"no {pattern} in:\n{self.log.read_text()}"
            time.sleep(0.02)

    def ends(self) -> int:
        """Its exit code."""
        return self.process.wait(DEADLINE)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.ends()


Start = Callable[..., Started]


@pytest.fixture
def start(root: None, tmp_path: Path) -> Iterator[Start]:
    """Starts processes, in a network namespace of the test's own; none of them outlives it."""
    processes: list[Started] = []

    def start(arguments: str, before: Sequence[str] = (), quiet: str = QUIET, program: str = "") -> Started:
        processes.append(Started(tmp_path, f"{quiet} {arguments}", before, program))
        return processes[-1]

    with own_network_namespace():
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        try:
            yield start
        finally:
            for each in processes:
                each.process.kill()
                each.process.wait()
            if any("userspace" in each.log.read_text() for each in processes):  # workers outlive their agent
                subprocess.run([sys.executable, "-m", "proxy", "cleanup"], check=True)


def only_line(started: Started) -> str:
    """The one line at the level of warnings or above."""
    text = started.log.read_text()
    assert "Traceback" not in text, text
    assert TOKEN not in text, text
    lines = started.lines("warning", "error", "critical")
    assert len(lines) == 1, text
    return lines[0]


def manifests(directory: Path) -> str:
    (directory / "manifests").mkdir(exist_ok=True)
    return f"--manifests={directory}/manifests"


def kubeconfig(directory: Path, server: str, **cluster: Any) -> str:
    path = directory / "kubeconfig"
    path.write_text(
        json.dumps(
            {
                "current-context": "c",
                "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
                "clusters": [{"name": "c", "cluster": {"server": server, **cluster}}],
                "users": [{"name": "u", "user": {"token": TOKEN}}],
            }
        )
    )
    return f"--kubeconfig={path}"


# --- what the agent cannot do without: it ends with 1 ----------------------------------------------------------


def without_nfnetlink() -> None:
    """Have the kernel refuse netlink sockets of netfilter to this process, as one without them does (seccomp)."""

    def statement(code: int, yes: int, no: int, value: int) -> bytes:
        return struct.pack("HBBI", code, yes, no, value)

    program = b"".join(
        (
            statement(0x20, 0, 0, 0),  # the call's number
            statement(0x15, 0, 5, {"x86_64": 41, "aarch64": 198}[os.uname().machine]),  # socket?
            statement(0x20, 0, 0, 16),  # its first argument
            statement(0x15, 0, 3, socket.AF_NETLINK),
            statement(0x20, 0, 0, 32),  # its third
            statement(0x15, 0, 1, 12),  # NETLINK_NETFILTER
            statement(0x06, 0, 0, 0x00050000 | 93),  # EPROTONOSUPPORT
            statement(0x06, 0, 0, 0x7FFF0000),  # allowed
        )
    )
    library = ctypes.CDLL(None, use_errno=True)
    text = ctypes.create_string_buffer(program)
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(text)))
    assert library.prctl(38, 1, 0, 0, 0) == 0  # no new privileges
    assert library.prctl(22, 2, header, 0, 0) == 0, ctypes.get_errno()


WITHOUT_NFNETLINK = [sys.executable, "-m", "tests.netns.test_operator_mistakes"]
CAPABILITY = "needs the capability CAP_NET_ADMIN: run sluice as root, or give its container NET_ADMIN and NET_RAW"

UNABLE = {
    "not root": (NOBODY, "--proxy-mode=iptables", CAPABILITY),
    "root without NET_ADMIN": (f"setpriv {PRIVILEGES.format('-net_admin')}", "--proxy-mode=nftables", CAPABILITY),
    "iptables-legacy without NET_RAW": (
        f"setpriv {PRIVILEGES.format('-net_raw')}",
        "--proxy-mode=iptables --iptables-backend=legacy",
        "iptables-legacy is not available on this host: give the process CAP_NET_ADMIN and CAP_NET_RAW, or load",
    ),
    "a kernel without nftables": (
        WITHOUT_NFNETLINK,
        "--proxy-mode=nftables",
        "this kernel has no nftables over netlink (CONFIG_NF_TABLES, CONFIG_NETFILTER_NETLINK)",
    ),
    "a kernel without nftables, for iptables": (
        WITHOUT_NFNETLINK,
        "--proxy-mode=iptables --iptables-backend=nft",
        "iptables-nft is not available on this host: give the process CAP_NET_ADMIN and CAP_NET_RAW, or load the ker",
    ),
}


@pytest.mark.parametrize("case", UNABLE)
def test_cfg_51_61_what_the_mode_needs_and_lacks_is_one_line_and_exit_code_1(case, start, tmp_path):
    before, arguments, expected = UNABLE[case]
    tmp_path.chmod(0o755)
    prefix = before.split() if isinstance(before, str) else before
    started = start(f"{manifests(tmp_path)} {arguments}", prefix)
    assert started.ends() == 1
    assert expected in only_line(started)


def test_a_kernel_without_nftables_takes_the_next_mode_and_says_why(start, tmp_path):
    started = start(manifests(tmp_path), WITHOUT_NFNETLINK)
    started.wait_for("synced .*IPv4")
    assert started.stop() == 0
    assert "mode chosen" in started.log.read_text()
    assert "this kernel has no nftables over netlink" in started.log.read_text()


def test_without_the_privilege_for_rules_an_empty_mode_is_userspace_and_says_what_is_not_served(start, tmp_path):
    """Issue 6: it is the last resort where the node's policy forbids netfilter."""
    started = start(manifests(tmp_path), f"setpriv {PRIVILEGES.format('-net_admin')}".split())
    started.wait_for("synced .*IPv4")
    assert started.stop() == 0
    assert re.search("mode chosen +mode=userspace because=.this process lacks CAP_NET_ADMIN", started.log.read_text())


KUBECONFIGS = {
    "none": (None, "kubeconfig {}: No such file or directory: give one that this user can read"),
    "broken": ("a: [b", "kubeconfig {}: not valid YAML at line 1"),
    "empty": ("", "kubeconfig {}: it is empty"),
    "no context": ("clusters: []", "kubeconfig {}: no current-context: kubectl config use-context NAME sets it"),
}


@pytest.mark.parametrize("case", KUBECONFIGS)
def test_cfg_15_a_kubeconfig_that_cannot_be_used_is_one_line(case, start, tmp_path):
    text, expected = KUBECONFIGS[case]
    path = tmp_path / "kubeconfig"
    if text is not None:
        path.write_text(text)
    started = start(f"--kubeconfig={path}")
    assert started.ends() == 1
    assert expected.replace("{}", str(path)) in only_line(started)


def test_a_configuration_file_that_this_user_may_not_read_is_one_line(start, tmp_path):
    path = tmp_path / "config"
    path.write_text("mode: nftables\n")
    path.chmod(0o600)
    for each in (tmp_path, *tmp_path.parents[:3]):
        each.chmod(each.stat().st_mode | 0o055)  # the way to it
    started = start(f"{manifests(tmp_path)} --config={path}", NOBODY.split())
    assert started.ends() == 1
    assert started.lines() == [f"sluice run: --config {path}: Permission denied: let user 65534 read it"]


def test_cfg_15_without_any_source_of_objects_the_line_names_both(start, tmp_path):
    started = start("")
    assert started.ends() == 1
    assert "give --kubeconfig FILE, or --manifests PATH to run without an API server" in only_line(started)


def test_a_second_agent_names_the_first(start, tmp_path):
    first = start(manifests(tmp_path))
    first.wait_for("starting")
    second = start(manifests(tmp_path))
    assert second.ends() == 1
    expected = f"another sluice runs in this network namespace (process {first.process.pid}); stop it first, or use "
    assert f"{expected}--takeover to wait for its end" in only_line(second)
    assert first.stop() == 0


def test_a_reload_ends_nobody_who_still_waits_for_his_turn(start, tmp_path):
    path = tmp_path / "config.yaml"
    text = "conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}\nmode: nftables\n"
    text += f"oomScoreAdj: {Path('/proc/self/oom_score_adj').read_text()}"
    path.write_text(f"apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n{text}")
    first = start(manifests(tmp_path))
    first.wait_for("starting")
    second = start(f"{manifests(tmp_path)} --config={path} --takeover", quiet="--hostname-override=node1")
    second.wait_for("waiting")
    path.write_text(path.read_text() + "mod: x\n")
    second.process.send_signal(signal.SIGHUP)
    assert first.stop() == 0
    second.wait_for("starting")
    second.wait_for("unknown field mod")
    assert second.stop() == 0


# --- ports -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def listening(*addresses: tuple[str, int]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for address in addresses:
            stack.enter_context(socket.create_server(address))
        yield


HEALTH = "cannot serve health on 0.0.0.0:10256: Address already in use: end what listens there (ss -ltnp shows it), or "
HEALTH += "set another healthzBindAddress"
METRICS = "cannot serve metrics on 127.0.0.1:10249: Address already in use: end what listens there (ss -ltnp shows it),"
METRICS += " or set another metricsBindAddress"
PORTS = {"healthz": (("0.0.0.0", 10256), HEALTH), "metrics": (("127.0.0.1", 10249), METRICS)}


@pytest.mark.parametrize("server", PORTS)
def test_hc_8_http_3_a_taken_port_is_one_line_and_the_rest_works(server, start, tmp_path):
    address, expected = PORTS[server]
    with listening(address):
        started = start(manifests(tmp_path))
        started.wait_for("not served")
        started.wait_for("synced .*IPv4")
        assert expected in only_line(started)
    assert started.stop() == 0


@pytest.mark.parametrize("server", PORTS)
def test_cfg_55_a_taken_port_ends_the_agent_where_it_is_told_to(server, start, tmp_path):
    address, expected = PORTS[server]
    with listening(address):
        started = start(f"{manifests(tmp_path)} --bind-address-hard-fail")
        assert started.ends() == 1
    assert expected in only_line(started)


def test_hc_21_a_taken_health_check_port_is_taken_once_it_is_free_though_nothing_changes(start, tmp_path):
    ports = [{"port": 80, "nodePort": 30080}]
    local = {"externalTrafficPolicy": "Local", "healthCheckNodePort": 30123}
    cluster = {"clusterIP": "10.96.0.20", "clusterIPs": ["10.96.0.20"]}
    balanced = {"type": "LoadBalancer", "ports": ports, **cluster, **local}
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "lb", "namespace": "ns"}, "spec": balanced}
    source = manifests(tmp_path)
    (tmp_path / "manifests/objects.json").write_text(json.dumps(service))
    with listening(("0.0.0.0", 30123)):
        started = start(source, quiet=QUIET.replace("primary", "0.0.0.0/0"))
        started.wait_for("in trouble .*cannot serve health checks on port 30123: Address already in use")
    started.wait_for("no longer in trouble .*health check IPv4")
    with socket.create_connection(("127.0.0.1", 30123), DEADLINE) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 503 ")
    assert started.stop() == 0


def test_a_port_that_takes_a_privilege_names_it(start, tmp_path):
    prefix = f"setpriv {PRIVILEGES.format('-net_bind_service')}".split()
    started = start(f"{manifests(tmp_path)} --healthz-bind-address=127.0.0.1:80", prefix)
    started.wait_for("not served")
    assert "a port below 1024 takes CAP_NET_BIND_SERVICE, set another healthzBindAddress" in only_line(started)
    assert started.stop() == 0


# --- the API server --------------------------------------------------------------------------------------------


class Answers(http.server.BaseHTTPRequestHandler):
    """Says one thing to everybody."""

    status = 200
    body = b""

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    do_POST = do_GET  # noqa: N815  # the name that the library calls

    def log_message(self, *_: object) -> None:
        """It is not asked for."""


@contextlib.contextmanager
def answering(status: int, body: bytes, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """The URL of a server that says this to everybody."""
    handler = type("Handler", (Answers,), {"status": status, "body": body})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that hang up are the test's own
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http{'s' if tls else ''}://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def refusal(code: int, message: str) -> bytes:
    return json.dumps({"kind": "Status", "apiVersion": "v1", "code": code, "message": message}).encode()


SERVERS = {
    "401": (401, refusal(401, "Unauthorized"), r'why="Unauthorized \(401\)".*do="renew the token or the client certif'),
    "403": (
        403,
        refusal(403, 'services is forbidden: User "u" cannot list resource "services"'),
        r'services is forbidden: .*\(403\)".*do="bind this user to the ClusterRole system:node-proxier"',
    ),
    "404": (404, b"404 page not found", r'why="404 page not found \(404\)".*do="see whether the server of the kubec'),
    "500": (
        500,
        refusal(500, "etcd is away"),
        r'why="etcd is away \(500\)".*do="the API server has a trouble of its o',
    ),
    "garbage": (200, b"<html>", 'why="the watch broke off in the middle of an event".*do="see whether that is an API'),
}


@pytest.mark.parametrize("case", SERVERS)
def test_an_api_server_that_refuses_is_one_line_and_the_agent_waits(case, start, tmp_path):
    status, body, expected = SERVERS[case]
    with answering(status, body) as url:
        started = start(kubeconfig(tmp_path, url))
        started.wait_for(" lost .*lost|lost (.|\n)*resource=nodes|lost")
        line = next(each for each in started.lines("warning"))
        assert f"server={url}" in line
        assert re.search(expected, line), line
        if case != "garbage":  # an answer of 200 is a recovery, for a moment
            assert only_line(started) == line
        assert started.stop() == 0


def test_an_api_server_that_is_away_is_one_line(start, tmp_path):
    started = start(kubeconfig(tmp_path, "http://127.0.0.1:1"))
    started.wait_for("lost")
    line = only_line(started)
    assert 'why="cannot connect to 127.0.0.1:1: connection refused"' in line
    assert 'do="see whether it runs and can be reached from this node' in line
    assert started.stop() == 0


def test_an_api_server_whose_certificate_nobody_vouches_for_is_one_line(start, tmp_path):
    authority = Authority(tmp_path)
    with answering(200, b"{}", authority.serving(authority.server("IP:127.0.0.1"))) as url:
        started = start(kubeconfig(tmp_path, url))
        started.wait_for("lost")
        line = only_line(started)
        assert "the server's certificate is not trusted" in line
        assert 'do="give the right certificate-authority in the kubeconfig' in line
        assert started.stop() == 0


def test_a_server_without_tls_where_tls_is_expected_is_one_line(start, tmp_path):
    with answering(200, b"{}") as url:
        started = start(kubeconfig(tmp_path, url.replace("http:", "https:")))
        started.wait_for("lost")
        assert "TLS: " in only_line(started)
        assert started.stop() == 0


# --- the machine -----------------------------------------------------------------------------------------------


def test_cfg_64_at_verbosity_4_every_object_that_comes_is_a_line(start, tmp_path):
    started = start(f"{manifests(tmp_path)} -v=4")
    started.wait_for("synced .*IPv4")
    spec = {"clusterIP": "10.96.0.20", "clusterIPs": ["10.96.0.20"], "ports": [{"port": 80}]}
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "ns"}, "spec": spec}
    (tmp_path / "manifests/objects.json").write_text(json.dumps(service))
    started.wait_for("debug +sluice.agent +object +how=set resource=services object=ns/web differs=True")
    assert started.stop() == 0


def test_missing_manifests_are_one_line_and_are_waited_for(start, tmp_path):
    started = start(f"--manifests={tmp_path}/none")
    started.wait_for("in trouble")
    line = only_line(started)
    assert f"subject={tmp_path}/none" in line
    assert "No such file or directory: waiting for it" in line
    assert started.stop() == 0


def test_an_unknown_field_of_the_file_is_one_line_and_the_rest_holds(start, tmp_path):
    path = tmp_path / "config.yaml"
    text = "nodePortAddresses: [primary]\nmod: x\nconntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, "
    text += f"tcpCloseWaitTimeout: 0s}}\noomScoreAdj: {Path('/proc/self/oom_score_adj').read_text()}"
    path.write_text(f"apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n{text}")
    started = start(f"{manifests(tmp_path)} --config={path}", quiet="--hostname-override=node1")
    started.wait_for("synced .*IPv4")
    assert f"{path}:4: unknown field mod; did you mean mode?" in only_line(started)
    assert started.stop() == 0


READ_ONLY = "mount --bind /proc/sys /proc/sys && mount -o remount,ro,bind /proc/sys"


def test_ct_8_a_read_only_proc_is_one_line_and_the_rules_are_written(start, tmp_path):
    prefix = ["unshare", "-m", "sh", "-c", f'{READ_ONLY}; exec "$@"', "sh"]
    started = start(f"{manifests(tmp_path)} --conntrack-udp-timeout=77s", prefix)
    started.wait_for("synced .*IPv4")
    line = only_line(started)
    assert "cannot set net.netfilter.nf_conntrack_udp_timeout to 77: Read-only file system" in line
    assert "do=" in line
    assert "--init-only" in line
    assert started.stop() == 0


def test_a_full_disk_under_the_log_and_the_socket_stops_nothing(start, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    script = (
        f'mount -t tmpfs -o size=4k none {full}; head -c 8k /dev/zero > {full}/x 2>/dev/null; exec "$@" 2>/dev/full'
    )
    prefix = ["unshare", "-m", "sh", "-c", script, "sh"]
    started = start(f"{manifests(tmp_path)} --run-directory={full}/run", prefix)
    deadline = time.monotonic() + DEADLINE
    listing = ""
    while "table ip sluice" not in listing:
        assert started.process.poll() is None
        assert time.monotonic() < deadline
        listing = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout
    assert started.stop() == 0


def test_a_directory_for_the_socket_that_cannot_be_written_is_one_line(start, tmp_path):
    (tmp_path / "run").write_text("")
    started = start(manifests(tmp_path))
    started.wait_for("synced .*IPv4")
    line = only_line(started)
    assert "the agent's socket cannot be made: status and others will not work" in line
    assert f"{tmp_path}/run" in line
    assert started.stop() == 0


def test_closed_standard_streams_are_no_reason_to_end_and_no_sockets_place(start, tmp_path):
    started = start(manifests(tmp_path), ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"])
    deadline = time.monotonic() + DEADLINE
    listing = ""
    while "table ip sluice" not in listing:
        assert started.process.poll() is None
        assert time.monotonic() < deadline
        listing = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout
    descriptors = Path(f"/proc/{started.process.pid}/fd")
    assert [str((descriptors / str(number)).readlink()) for number in range(3)] == ["/dev/null"] * 3
    assert started.stop() == 0


def test_as_many_descriptors_as_allowed_are_taken_and_too_few_are_named(start, tmp_path):
    started = start(manifests(tmp_path), ["prlimit", "--nofile=256:4096"])
    started.wait_for("synced .*IPv4")
    limits = Path(f"/proc/{started.process.pid}/limits").read_text()
    assert re.search(r"Max open files +4096 +4096", limits)
    assert started.stop() == 0
    few = start(manifests(tmp_path), ["prlimit", "--nofile=12:12"])
    assert few.ends() == 1
    assert "Too many open files: raise the limit of open files (ulimit -n, LimitNOFILE= of a unit)" in few.lines()[-1]
    assert "Traceback" not in few.log.read_text()


def test_a_current_directory_that_is_gone_is_named(start, tmp_path):
    script = f'mkdir {tmp_path}/gone; cd {tmp_path}/gone; rmdir {tmp_path}/gone; exec "$@"'
    started = start("--manifests=here", ["sh", "-c", script, "sh"], program="sluice")
    assert started.ends() == 1
    assert started.lines() == [
        "sluice run: the current directory: No such file or directory: change to one that is there"
    ]


if __name__ == "__main__":
    # Runs a command for which the kernel has no nfnetlink.
    without_nfnetlink()
    os.execvp(sys.argv[1], sys.argv[1:])
