"""The agent's HTTP servers, on real sockets: HC-1, HC-6 to HC-8, HC-20 to HC-25, HTTP-1 to HTTP-3."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from proxy.config.settings import HostPort, Settings
from proxy.objects import Key
from proxy.serving.health import ProxyHealth
from proxy.serving.healthcheck import HealthCheckServers, check
from proxy.serving.http import GuardedServer, Listener, bind
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


async def get(port, path="/", method="GET", host="127.0.0.1"):
    """Status, headers and body of an answer, as they stand on the wire."""
    async with asyncio.timeout(DEADLINE):
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
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
        assert (await get(port, "/debug/pprof/"))[0] == 404


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
        with pytest.raises(BindError, match=rf"cannot serve .* on 127.0.0.1:{port}: Address already in use"):
            await serve(agent.settings, agent.health, agent.metrics, proxy_mode="nftables")


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


# --- the guard against strangers -------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def guarded(**bounds):
    async def handle(_request):
        return web.Response(text="ok")

    server = GuardedServer(handle, **bounds)
    runner = web.ServerRunner(server, shutdown_timeout=0.1)
    await runner.setup()
    sock = bind("127.0.0.1", 0)
    await web.SockSite(runner, sock).start()
    try:
        yield sock.getsockname()[1]
    finally:
        await runner.cleanup()


@in_loop
async def test_a_client_that_says_nothing_is_put_out():
    async with guarded(deadline=0.05) as port, asyncio.timeout(DEADLINE):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HT")
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()


@in_loop
async def test_silent_clients_make_room_for_the_next():
    async with guarded(connections=3, deadline=600) as port:
        async with asyncio.timeout(DEADLINE):
            silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]
        assert (await get(port))[::2] == (200, "ok")
        for _, writer in silent:
            writer.close()


@in_loop
async def test_a_connection_serves_one_request():
    async with guarded() as port, asyncio.timeout(DEADLINE):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 2)
        assert (await reader.read()).count(b"HTTP/1.1 200") == 1
        writer.close()


@pytest.mark.parametrize(
    "garbage", [b"\0" * 100, b"GET / HTTP/9\r\n\r\n", b"X" * 100_000, b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n"]
)
@in_loop
async def test_garbage_is_answered_or_dropped_and_the_server_lives(garbage, caplog):
    async with guarded() as port:
        async with asyncio.timeout(DEADLINE):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.suppress(ConnectionError):
                writer.write(garbage)
                await writer.drain()
                assert b"200" not in await reader.read()
            writer.close()
        assert (await get(port))[0] == 200
    assert not caplog.records  # strangers must not be able to fill the log


@in_loop
async def test_a_closed_listener_can_be_closed_again():
    listener = Listener(lambda _request: None)
    await listener.close()
    await listener.listen(bind("127.0.0.1", 0))
    await listener.close()
    await listener.close()


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
        self.healthy = True
        self.servers = HealthCheckServers(
            Family.IPV4,
            lambda: self.healthy,
            addresses=[parse_address(each) for each in addresses or ("127.0.0.1",)],
            report=lambda key, reason: self.reports.append((str(key), reason)),
        )

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_error):
        await self.servers.close()


@in_loop
async def test_hc_23_a_service_answers_with_its_weight_on_any_path():
    async with Checks() as checks:
        port = free_port()
        await checks.servers.sync({SVC: (port, 3)})
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
        await checks.servers.sync({SVC: (first, 1)})
        before = checks.servers._servers[SVC].listener
        await checks.servers.sync({SVC: (first, 0)})
        assert (await get(first))[0] == 503
        assert checks.servers._servers[SVC].listener is before  # a new count opens nothing anew
        await checks.servers.sync({SVC: (second, 1)})
        assert (await get(second))[0] == 200
        await refused(first)
        await checks.servers.sync({})
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
        await checks.servers.sync({SVC: (first, 1), other: (second, 0)})
        await checks.servers.sync({SVC: (second, 1), other: (first, 0)})
        assert [(await get(port))[0] for port in (first, second)] == [503, 200]


@in_loop
async def test_hc_21_a_port_that_is_taken_is_reported_and_tried_again():
    async with Checks() as checks:
        with taken_port() as port:
            await checks.servers.sync({SVC: (port, 1)})
            reason = f"cannot serve health checks on port {port}: Address already in use"
            assert checks.reports == [("default/lbl", reason)]
            assert checks.servers.ports == {}
            await checks.servers.sync({SVC: (port, 1)})
            assert len(checks.reports) == 2
        await checks.servers.sync({SVC: (port, 1)})
        assert checks.reports[-1] == ("default/lbl", None)
        assert (await get(port))[0] == 200


@in_loop
async def test_hc_21_the_report_ends_with_its_service():
    async with Checks() as checks:
        with taken_port() as port:
            await checks.servers.sync({SVC: (port, 1)})
            await checks.servers.sync({})
        assert checks.reports[-1] == ("default/lbl", None)


@in_loop
async def test_hc_20_only_node_port_addresses_are_listened_on():
    port = free_port()
    async with Checks("127.0.0.2", "127.0.0.3") as checks:
        await checks.servers.sync({SVC: (port, 1)})
        assert [(await get(port, host=host))[0] for host in ("127.0.0.2", "127.0.0.3")] == [200, 200]
        await refused(port)
        await checks.servers.set_addresses([parse_address("127.0.0.1")])
        await checks.servers.sync({SVC: (port, 1)})
        assert (await get(port))[0] == 200


@in_loop
async def test_hc_21_when_one_address_fails_none_is_kept():
    async with Checks("127.0.0.2", "127.0.0.1") as checks:
        with taken_port() as port:
            await checks.servers.sync({SVC: (port, 1)})
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.2", port)


@in_loop
async def test_hc_20_each_family_listens_on_its_own():
    port = free_port()
    both = [HealthCheckServers(family, lambda: True) for family in Family]
    for count, servers in enumerate(both, 1):
        await servers.sync({SVC: (port, count)})
    weights = [(await get(port, host=host))[1]["X-Load-Balancing-Endpoint-Weight"] for host in ("127.0.0.1", "::1")]
    assert weights == ["1", "2"]
    for servers in both:
        await servers.close()


def test_settings_name_where_servers_listen():
    assert str(HostPort("::", 1)) == "[::]:1"
    assert str(Settings().healthz_bind_address) == "0.0.0.0:10256"
