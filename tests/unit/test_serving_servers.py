"""The agent's HTTP servers, on real sockets: HC-1, HC-6 to HC-8, HC-20 to HC-25, HTTP-1 to HTTP-3."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import re
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from proxy.config.settings import HostPort, Settings
from proxy.objects import Key
from proxy.serving.health import ProxyHealth
from proxy.serving.healthcheck import HealthCheckServers, check
from proxy.serving.metrics import Metrics
from proxy.serving.servers import BindError, serve
from rules.forwarding import Family, parse_address

DATA = Path(__file__).parents[1] / "data" / "kube-proxy-v1.36.2"
SVC = Key("default", "lbl")
DEADLINE = 10.0


def in_loop(test):
    """Run a coroutine function as a test."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        asyncio.run(test(*args, **kwargs))

    return run


async def get(port, path="/", method="GET", host="127.0.0.1", body=""):
    """Status, headers and body of an answer, as they stand on the wire."""
    async with asyncio.timeout(DEADLINE):
        reader, writer = await asyncio.open_connection(host, port)
        length = f"Content-Length: {len(body)}\r\n" if body else ""
        writer.write(f"{method} {path} HTTP/1.1\r\nHost: x\r\n{length}\r\n{body}".encode())
        head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
        writer.close()
    status, *lines = head.split("\r\n")
    return int(status.split()[1]), dict(line.split(": ", 1) for line in lines), body


@contextlib.contextmanager
def taken_port(host="127.0.0.1"):
    """A port that somebody else listens on."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        sock.bind((host, 0))
        sock.listen()
        yield sock.getsockname()[1]


def free_port(host="127.0.0.1"):
    with socket.socket() as sock:
        sock.bind((host, 0))
        return sock.getsockname()[1]


class Agent:
    """Health, metrics and their servers on loopback."""

    def __init__(self, **settings):
        defaults = {"healthz_bind_address": HostPort("127.0.0.1", 0), "metrics_bind_address": HostPort("127.0.0.1", 0)}
        self.settings = Settings(**(defaults | settings))
        self.health = ProxyHealth(60.0)
        self.health.set_eligible(True)
        self.metrics = Metrics("nftables", "1.2.3")
        self.ports = {}
        self.listened = asyncio.Event()
        self.up = asyncio.Event()
        self.pauses = []
        self.paused_twice = asyncio.Event()
        self.may_retry = asyncio.Event()

    def listening(self, name, address):
        self.ports[name] = address.port
        self.listened.set()
        if len(self.ports) == 2:
            self.up.set()

    async def sleep(self, seconds):
        self.pauses.append(seconds)
        if len(self.pauses) == 2:
            self.paused_twice.set()
        await self.may_retry.wait()
        self.may_retry.clear()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Agent]:
        task = asyncio.create_task(
            serve(
                self.settings,
                self.health,
                self.metrics,
                proxy_mode="nftables",
                version="1.2.3",
                listening=self.listening,
                sleep=self.sleep,
            )
        )
        try:
            async with asyncio.timeout(DEADLINE):
                await self.up.wait()
            yield self
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


@in_loop
async def test_hc_1_probes_are_answered_for_any_method_with_their_headers():
    async with Agent().running() as agent:
        for family in Family:
            agent.health.started(family)
        for method in ("GET", "POST", "PUT"):
            status, headers, body = await get(agent.ports["health"], "/healthz?verbose", method)
            assert status == 200
            assert headers["Content-Type"] == "application/json"
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert json.loads(body)["status"]["IPv6"]["healthy"] is True
        agent.health.set_eligible(False)
        assert (await get(agent.ports["health"], "/healthz"))[0] == 503
        assert (await get(agent.ports["health"], "/livez"))[0] == 200
        assert (await get(agent.ports["health"], "/"))[0] == 404
        _, _, text = await get(agent.ports["metrics"], "/metrics")
        assert 'kubeproxy_proxy_healthz_total{code="200"} 3.0' in text  # HC-7
        assert 'kubeproxy_proxy_healthz_total{code="503"} 1.0' in text
        assert 'kubeproxy_proxy_livez_total{code="200"} 1.0' in text


@in_loop
async def test_http_1_paths_of_the_metrics_server():
    async with Agent(configz={"mode": "nftables"}).running() as agent:
        port = agent.ports["metrics"]
        assert (await get(port, "/healthz"))[::2] == (200, "ok")
        assert (await get(port, "/healthz/ping"))[::2] == (200, "ok")
        status, headers, body = await get(port, "/proxyMode")
        assert (status, headers["Content-Type"], body) == (200, "text/plain; charset=utf-8", "nftables")
        assert (await get(port, "/configz"))[2] == '{"kubeproxy.config.k8s.io":{"mode":"nftables"}}'
        status, headers, body = await get(port, "/metrics")
        assert (status, headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
        assert "process_resident_memory_bytes" in body
        assert (
            'kubernetes_healthchecks_total{name="ping",status="success",type="healthz"} 2.0'
            in (await get(port, "/metrics/slis"))[2]
        )
        for path in ("/debug/pprof/", "/debug/flags/v", "/nothing", "/metrics/"):
            assert (await get(port, path))[::2] == (404, "404 page not found\n")


@in_loop
async def test_http_1_statusz_and_flagz_go_with_their_gates():
    async with Agent().running() as agent:
        status, headers, body = await get(agent.ports["metrics"], "/statusz")
        assert (status, headers["Content-Type"]) == (200, "text/plain; charset=utf-8")
        assert "Paths: /configz /flagz /healthz /metrics /proxyMode /statusz\n" in body
        assert (await get(agent.ports["metrics"], "/flagz"))[2].startswith("\nkube-proxy flagz\n")
    async with Agent(feature_gates={"ComponentStatusz": False, "ComponentFlagz": False}).running() as agent:
        assert [(await get(agent.ports["metrics"], path))[0] for path in ("/statusz", "/flagz")] == [404, 404]


@in_loop
async def test_http_1_profiles_are_there_with_enable_profiling():
    async with Agent(enable_profiling=True).running() as agent:
        port = agent.ports["metrics"]
        status, _, body = await get(port, "/debug/pprof/")
        assert (status, body.split()[0]) == (200, "/debug/pprof/")
        assert "/debug" in (await get(port, "/statusz"))[2]
        assert (await get(port, "/debug/pprof/heap"))[0] == 200
        assert (await get(port, "/debug/pprof/profile?seconds=0.05"))[0] == 200


@in_loop
async def test_http_1_the_verbosity_can_be_put(monkeypatch):
    configured = []
    monkeypatch.setattr("proxy.serving.servers.logs.set_verbosity", configured.append)
    async with Agent(enable_profiling=True).running() as agent:
        port = agent.ports["metrics"]
        status, _, body = await get(port, "/debug/flags/v", "PUT", body="4")
        assert (status, body) == (200, "successfully set klog.logging.verbosity to 4")
        assert configured == [4]
        assert (await get(port, "/debug/flags/v", "PUT", body="x"))[0] == 400
        assert (await get(port, "/debug/flags/v", "PUT"))[0] == 400
        assert (await get(port, "/debug/flags/v"))[0] == 405
    assert len(configured) == 1


@in_loop
async def test_answers_do_not_tell_what_serves_them():
    async with Agent().running() as agent:
        _, headers, _ = await get(agent.ports["metrics"], "/healthz")
        assert headers["Server"] == "sluice"


@in_loop
async def test_hc_8_a_server_that_cannot_listen_is_tried_again_every_5_seconds():
    with taken_port() as port:
        agent = Agent(healthz_bind_address=HostPort("127.0.0.1", port))
        agent.may_retry.set()
        task = asyncio.create_task(agent_until_up(agent))
        async with asyncio.timeout(DEADLINE):
            await agent.paused_twice.wait()
            await agent.listened.wait()
        assert set(agent.ports) == {"metrics"}  # which does not wait for the other
    agent.may_retry.set()
    assert await task == 200
    assert set(agent.pauses) == {5.0}


async def agent_until_up(agent):
    async with agent.running():
        return (await get(agent.ports["health"], "/livez"))[0]


@pytest.mark.parametrize("which", ["healthz_bind_address", "metrics_bind_address"])
@in_loop
async def test_cfg_55_under_hard_fail_it_is_the_end(which):
    with taken_port() as port:
        agent = Agent(bind_address_hard_fail=True, **{which: HostPort("127.0.0.1", port)})
        told = []

        async def failed(server, reason):
            told.append((server, reason))

        server = {"healthz_bind_address": "health", "metrics_bind_address": "metrics"}[which]
        reason = f"cannot serve {server} on 127.0.0.1:{port}: Address already in use"
        with pytest.raises(BindError, match=re.escape(reason)):
            await serve(agent.settings, agent.health, agent.metrics, proxy_mode="nftables", failed=failed)
        [(told_of, told_why)] = told
        assert told_of == server
        assert told_why.startswith(f"{reason}: end what listens there")


@in_loop
async def test_hc_8_without_an_address_nothing_is_served():
    agent = Agent(healthz_bind_address=None, metrics_bind_address=None)
    async with asyncio.timeout(DEADLINE):
        await serve(agent.settings, agent.health, agent.metrics, proxy_mode="nftables")


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
@in_loop
async def test_an_unspecified_address_is_served_in_both_families(host):
    async with Agent(healthz_bind_address=HostPort(host, 0)).running() as agent:
        for client in ("127.0.0.1", "::1"):
            assert (await get(agent.ports["health"], "/livez", host=client))[0] == 200


# --- health-check node ports -----------------------------------------------------------------------------------


def test_hc_24_bodies_are_byte_for_byte_as_recorded():
    status, _, rest = (DATA / "nftables.healthcheck-node-port.txt").read_text().partition("\n")
    answer = check(SVC, 0, healthy=True)
    assert answer.status == int(status)
    assert answer.body.decode() == rest.partition("\n\n\n")[2].removesuffix("\n")
    assert f"Content-Length: {len(answer.body)}" in rest


@pytest.mark.parametrize(
    ("count", "healthy", "status"), [(2, True, 200), (0, True, 503), (2, False, 503), (0, False, 503)]
)
def test_hc_23_status_is_200_with_endpoints_and_health_only(count, healthy, status):
    answer = check(SVC, count, healthy=healthy)
    assert answer.status == status
    assert json.loads(answer.body)["serviceProxyHealthy"] is healthy


class Checks:
    """Health-check servers on loopback, and what they reported."""

    def __init__(self, *addresses):
        self.reports = []
        self.failures = []
        self.healthy = True
        self.servers = HealthCheckServers(
            Family.IPV4,
            lambda: self.healthy,
            addresses=[parse_address(each) for each in addresses or ("127.0.0.1",)],
            report=lambda key, reason: self.reports.append((str(key), reason)),
            failed=lambda *failure: self.failures.append(failure),
        )

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_error):
        self.servers.close()


@in_loop
async def test_hc_23_a_service_answers_with_its_weight_on_any_path():
    async with Checks() as checks:
        port = free_port()
        checks.servers.sync({SVC: (port, 3)})
        status, headers, body = await get(port, "/whatever")
        assert (status, headers["X-Load-Balancing-Endpoint-Weight"], headers["Content-Type"]) == (
            200,
            "3",
            "application/json",
        )
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert json.loads(body)["localEndpoints"] == 3
        checks.healthy = False
        assert (await get(port))[0] == 503


@in_loop
async def test_hc_21_servers_follow_what_is_wanted():
    async with Checks() as checks:
        first, second = free_port(), free_port()
        checks.servers.sync({SVC: (first, 1)})
        before = checks.servers._servers[SVC].listeners
        checks.servers.sync({SVC: (first, 0)})
        assert (await get(first))[0] == 503
        assert checks.servers._servers[SVC].listeners is before  # a new count opens nothing anew
        checks.servers.sync({SVC: (second, 1)})
        assert (await get(second))[0] == 200
        await refused(first)
        checks.servers.sync({})
        await refused(second)
        assert checks.servers.ports == {}


async def refused(port):
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)


@in_loop
async def test_hc_21_two_services_can_swap_their_ports():
    async with Checks() as checks:
        first, second = free_port(), free_port()
        other = Key("default", "other")
        checks.servers.sync({SVC: (first, 1), other: (second, 0)})
        checks.servers.sync({SVC: (second, 1), other: (first, 0)})
        assert [(await get(port))[0] for port in (first, second)] == [503, 200]


@in_loop
async def test_hc_21_a_port_that_is_taken_is_reported_and_tried_again():
    async with Checks() as checks:
        with taken_port() as port:
            checks.servers.sync({SVC: (port, 1)})
            reason = f"cannot serve health checks on port {port}: Address already in use"
            assert checks.reports == [("default/lbl", reason)]
            assert checks.servers.ports == {}
            checks.servers.sync({SVC: (port, 1)})
            assert len(checks.reports) == 2
            assert checks.failures == [(SVC, port, "Address already in use")] * 2
        checks.servers.sync({SVC: (port, 1)})
        assert checks.reports[-1] == ("default/lbl", None)
        assert (await get(port))[0] == 200


@in_loop
async def test_hc_21_the_report_ends_with_its_service():
    async with Checks() as checks:
        with taken_port() as port:
            checks.servers.sync({SVC: (port, 1)})
            checks.servers.sync({})
        assert checks.reports[-1] == ("default/lbl", None)


@in_loop
async def test_hc_20_only_node_port_addresses_are_listened_on():
    port = free_port()
    async with Checks("127.0.0.2", "127.0.0.3") as checks:
        checks.servers.sync({SVC: (port, 1)})
        assert [(await get(port, host=host))[0] for host in ("127.0.0.2", "127.0.0.3")] == [200, 200]
        await refused(port)
        checks.servers.set_addresses([parse_address("127.0.0.1")])
        checks.servers.sync({SVC: (port, 1)})
        assert (await get(port))[0] == 200


@in_loop
async def test_hc_21_when_one_address_fails_none_is_kept():
    async with Checks("127.0.0.2", "127.0.0.1") as checks:
        with taken_port() as port:
            checks.servers.sync({SVC: (port, 1)})
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.2", port)


@in_loop
async def test_hc_21_health_checks_leave_descriptors_for_everything_else():
    with socket.socket() as next_one:
        free = next_one.fileno()
    reports = {}
    servers = HealthCheckServers(
        Family.IPV4,
        lambda: True,
        addresses=[parse_address("127.0.0.1")],
        report=lambda key, reason: reports.__setitem__(key.name, reason),
        descriptors=free + 2,
    )
    wanted = {Key("default", name): (free_port(), 1) for name in ("one", "two", "three")}
    servers.sync(wanted)
    assert set(servers.ports) == {Key("default", "one"), Key("default", "two")}
    assert (reports["one"], reports["two"]) == (None, None)
    assert "raise the limit of open files" in reports["three"]
    del wanted[Key("default", "one")]
    servers.sync(wanted)
    assert servers.ports == {key: port for key, (port, _) in wanted.items()}
    servers.close()


@in_loop
async def test_hc_20_each_family_listens_on_its_own():
    port = free_port()
    both = [HealthCheckServers(family, lambda: True) for family in Family]
    for count, servers in enumerate(both, 1):
        servers.sync({SVC: (port, count)})
    weights = [(await get(port, host=host))[1]["X-Load-Balancing-Endpoint-Weight"] for host in ("127.0.0.1", "::1")]
    assert weights == ["1", "2"]
    for servers in both:
        servers.close()


def test_settings_name_where_servers_listen():
    assert str(HostPort("::", 1)) == "[::]:1"
    assert str(Settings().healthz_bind_address) == "0.0.0.0:10256"
