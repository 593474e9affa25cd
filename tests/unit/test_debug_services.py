"""The page about Services without a browser: what it lists, what changes, who may ask, and what is refused."""

from __future__ import annotations

import asyncio
import functools
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from proxy.config.settings import HostPort, Settings
from proxy.counters import Report, Row, Traffic
from proxy.desired import Desired
from proxy.explain.gather import Means
from proxy.explain.surroundings import Surroundings
from proxy.objects import Key
from proxy.serving import debug_services
from proxy.serving.debug_services import Node, ServicesPage, host_of, not_served, refuse
from proxy.serving.debug_services_map import Health, ServiceMap
from proxy.serving.messages import Request, Response
from proxy.sources.base import Resource
from proxy.state import State
from rules.forwarding import Family, ForwardingTable, parse_address
from tests.builders import NODE, endpoint, endpoint_slice, service

LOCAL = (("Host", "127.0.0.1:10249"),)
HOSTILE = "</script><img src=x onerror=alert(1)>"


def in_loop(test):
    """Run a coroutine function as a test."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        asyncio.run(test(*args, **kwargs))

    return run


class Counted:
    """Counters that say what a test tells them."""

    def __init__(self) -> None:
        self.told: list[Row] = []
        self.watching = 0

    def report(self) -> Report:
        return Report(on=True, since=60.0, looked=1.0)

    def rows(self) -> list[Row]:
        return self.told

    def watched(self) -> None:
        self.watching += 1


class World:
    """A state, its tables and a page about them."""

    def __init__(self, tmp_path: Path | None = None) -> None:
        self.settings = Settings(
            manifests="x", mode="nftables", node_port_addresses=("primary",), run_directory=str(tmp_path or "/nowhere")
        )
        self.state = State(NODE)
        self.desired = Desired(self.settings, NODE, self.state, tuple(Family))
        self.desired.set_interfaces({"eth0": (parse_address("192.0.2.1"),)})
        self.counters = Counted()
        self.now = 100.0
        self.map = ServiceMap(self.state, self.desired, tuple(Family))
        node = Node(name=NODE, version="1", mode="nftables", source="manifests x", families=tuple)
        means = Means(open_dataplane=self.open, look=lambda *_: Surroundings())
        self.page = ServicesPage(
            self.settings,
            node,
            self.state,
            self.desired,
            families=tuple(Family),
            counters=self.counters,
            means=means,
            clock=self.clock,
        )

    def clock(self) -> float:
        """Every look at it is a second later, so that nothing waits for long."""
        self.now += 1.0
        return self.now

    def open(self, name: str, family: Family) -> Any:
        desired = self.desired

        class Dataplane:
            def read(self) -> ForwardingTable | None:
                return desired.table(family) if name == "nftables" else None

            def close(self) -> None:
                pass

        return Dataplane()

    async def have(self, *objects: Any) -> None:
        for each in objects:
            self.state.set(Resource.SERVICES if type(each).__name__ == "Service" else Resource.SLICES, each)
        await self.desired.refresh()

    async def get(self, path: str, query: str = "", **headers: str) -> tuple[Response, Any]:
        lines = (*LOCAL, *((name.replace("_", "-"), value) for name, value in headers.items()))
        fields = "".join(f"{name}: {value}\r\n" for name, value in lines).encode()
        found = self.page.answer(Request("GET", f"/debug/services{path}", query, fields))
        response = found if isinstance(found, Response) else await found
        kind = dict(response.headers).get("Content-Type")
        return response, json.loads(response.body) if kind == "application/json" else response.body.decode()


def rows_of(world: World) -> dict[str, dict[str, Any]]:
    return {row["s"]: row for row in json.loads(b"[" + world.map.everything() + b"]")}


def web(**spec: Any) -> Any:
    return service("web", cluster_ip="10.96.0.1", **{"ports": [{"name": "http", "port": 80}], **spec})


def web_slice(*endpoints: Any, name: str = "web-1") -> Any:
    return endpoint_slice(endpoints, owner="web", name=name, ports=[{"name": "http", "port": 8080, "protocol": "TCP"}])


# --- what is listed --------------------------------------------------------------------------------------------------


@in_loop
async def test_a_row_has_what_people_search_for():
    world = World()
    await world.have(
        web(type="NodePort", ports=[{"name": "http", "port": 80, "nodePort": 30080}]),
        web_slice(endpoint("10.1.0.1"), endpoint("10.1.0.2", condition="N")),
    )
    await world.map.update()
    row = rows_of(world)["ns/web"]
    assert [each[:3] for each in row["f"]] == [
        ["http", "ClusterIP", "10.96.0.1:80/TCP"],
        ["http", "NodePort", "*:30080/TCP"],
    ]
    assert (row["t"], row["b"], row["r"], row["n"]) == ("NodePort", ["10.1.0.1:8080"], 1, 2)
    assert (row["h"], row["w"]) == (Health.WARN.value, "1 of 2 endpoints are not ready")


@in_loop
async def test_health_says_how_a_service_is_on_this_node():
    world = World()
    await world.have(
        web(),
        web_slice(endpoint("10.1.0.1")),
        service("empty", cluster_ip="10.96.0.2"),
        service("headless", cluster_ip="None"),
        service(
            "local",
            cluster_ip="10.96.0.3",
            type="LoadBalancer",
            vips=["203.0.113.1"],
            externalTrafficPolicy="Local",
            healthCheckNodePort=32000,
        ),
        endpoint_slice([endpoint("10.1.0.9")], owner="local", name="local-1"),
    )
    world.state.trouble("compute", "Service ns/web", "it is odd")
    world.state.trouble("state", "EndpointSlice ns/x", "an orphan")
    await world.map.update()
    found = {name.removeprefix("ns/"): (row["h"], row["w"]) for name, row in rows_of(world).items()}
    assert found["web"] == ("warn", "it is odd")
    assert found["empty"] == ("bad", "there are no endpoints")
    assert found["headless"][0] == "none"
    assert found["local"][0] == "note"
    world.state.trouble("compute", "Service ns/web", None)
    await world.map.update()
    assert rows_of(world)["ns/web"]["h"] == "ok"


@in_loop
async def test_only_what_changed_is_told_again():
    world = World()
    await world.have(web(), web_slice(endpoint("10.1.0.1")), service("other", cluster_ip="10.96.0.2"))
    await world.map.update()
    first = world.map.revision
    await world.map.update()
    assert world.map.revision == first, "nothing changed"
    await world.have(web_slice(endpoint("10.1.0.1"), endpoint("10.1.0.2")))
    await world.map.update()
    found = world.map.since(first)
    assert found is not None
    assert [json.loads(row)["s"] for row in found.rows] == ["ns/web"]
    assert json.loads(found.rows[0])["n"] == 2
    second = world.map.revision
    world.state.delete(Resource.SERVICES, Key("ns", "other"))
    await world.desired.refresh()
    await world.map.update()
    found = world.map.since(second)
    assert found is not None
    assert (found.rows, found.gone) == ([], ["ns/other"])
    assert "ns/other" not in rows_of(world)
    assert world.map.since(world.map.revision + 1) is None, "of a future that never was"


@in_loop
async def test_a_service_that_comes_again_is_not_told_as_gone():
    world = World()
    await world.have(web())
    await world.map.update()
    first = world.map.revision
    world.state.delete(Resource.SERVICES, Key("ns", "web"))
    await world.desired.refresh()
    await world.map.update()
    await world.have(web())
    await world.map.update()
    found = world.map.since(first)
    assert found is not None
    assert ([json.loads(row)["s"] for row in found.rows], found.gone) == (["ns/web"], [])


@in_loop
async def test_who_has_missed_too_much_is_told_to_load_anew(monkeypatch):
    monkeypatch.setattr("proxy.serving.debug_services_map.MOST_GONE", 2)
    world = World()
    await world.have(*(service(f"s{number}", cluster_ip=f"10.96.0.{number}") for number in range(1, 6)))
    await world.map.update()
    first = world.map.revision
    for number in range(1, 6):
        world.state.delete(Resource.SERVICES, Key("ns", f"s{number}"))
        await world.desired.refresh()
        await world.map.update()
    assert world.map.since(first) is None
    assert world.map.since(world.map.revision) is not None


def counted(name: str, connections: int, **fields: Any) -> Row:
    traffic = Traffic(connections=connections)
    return Row(family="IPv4", service=f"{name}:http", protocol="TCP", traffic=traffic, **fields)


@in_loop
async def test_traffic_is_told_where_it_moved():
    world = World()
    world.map.count([counted("ns/web", 1), counted("ns/web", 2), counted("ns/other", 5)])
    first = world.map.revision
    assert {name: each.connections for name, each in world.map.traffic().items()} == {"ns/web": 3, "ns/other": 5}
    world.map.count([counted("ns/web", 4), counted("ns/other", 5)])
    found = world.map.since(first)
    assert found is not None
    assert [(name, each.connections) for name, each in found.traffic] == [("ns/web", 4)]


# --- what is asked ---------------------------------------------------------------------------------------------------


@in_loop
async def test_all_services_then_what_changes():
    world = World()
    await world.have(web(), web_slice(endpoint("10.1.0.1")))
    world.counters.told = [counted("ns/web", 3)]
    response, found = await world.get("/data")
    assert response.status == 200
    assert [row["s"] for row in found["services"]] == ["ns/web"]
    assert found["traffic"]["moved"][0][:2] == ["ns/web", 3]
    assert found["traffic"]["at"] == 59.0
    assert (found["head"]["node"], found["head"]["counters"]["on"]) == (NODE, True)
    assert world.counters.watching
    place = f"{found['epoch']}.{found['revision']}"
    await world.have(web_slice(endpoint("10.1.0.1"), endpoint("10.1.0.2")))
    response, told = await world.get("/events", f"since={place}", Last_Event_ID=place)
    assert dict(response.headers)["Content-Type"].startswith("text/event-stream")
    events = dict(re.findall(r"event: (\w+)\ndata: (.*)\n\n", told))
    assert [row["n"] for row in json.loads(events["services"])["services"]] == [2]
    [again] = re.findall(r"^id: (\S+)$", told, re.MULTILINE)
    assert again > place
    _, told = await world.get("/events", Last_Event_ID=again)
    events = dict(re.findall(r"event: (\w+)\ndata: (.*)\n\n", told))
    assert set(events) == {"head", "traffic"}, "nothing else is new"
    assert json.loads(events["traffic"]) == {"at": 59.0, "moved": []}


@in_loop
async def test_much_is_compressed_for_whoever_takes_it():
    world = World()
    await world.have(web(), web_slice(endpoint("10.1.0.1")))
    _, plain = await world.get("/data")
    found = world.page.answer(Request("GET", "/debug/services/data", "", b"Host: ::1\r\n"))
    assert isinstance(found, Response), "an address in brackets alone is one"
    response = await world.page.answer(
        Request("GET", "/debug/services/data", "", b"Host: [::1]\r\nAccept-Encoding: gzip, br\r\n")
    )
    assert dict(response.headers)["Content-Encoding"] == "gzip"
    assert json.loads(gzip.decompress(response.body))["services"] == plain["services"]


@pytest.mark.parametrize("place", ["", "x.1", "zz", ".", "1.99999999999999999999", "9.-1"])
@in_loop
async def test_a_page_of_another_agent_loads_anew(place):
    world = World()
    _, told = await world.get("/events", f"since={place}")
    assert "event: reload" in told


@in_loop
async def test_only_some_may_wait(monkeypatch):
    world = World()
    monkeypatch.setattr(debug_services, "PAUSE", 0.05)
    _, found = await world.get("/data")
    place = f"{found['epoch']}.{found['revision']}"
    world.clock = lambda: 100.0
    world.page._clock = world.clock
    waiting = [asyncio.create_task(world.get("/events", Last_Event_ID=place)) for _ in range(2)]
    await asyncio.sleep(0)
    _, told = await world.get("/events", Last_Event_ID=place)
    assert f"retry: {debug_services.LATER}" in told, "a third one is answered at once"
    assert not any(each.done() for each in waiting)
    world.page._clock = lambda: 200.0
    for each in waiting:
        _, told = await asyncio.wait_for(each, 10)
        assert f"retry: {debug_services.SOON}" in told


@in_loop
async def test_one_service_with_all_its_endpoints_and_what_passed_them():
    world = World()
    await world.have(
        web(sessionAffinity="ClientIP", selector={"app": "web"}),
        web_slice(endpoint("10.1.0.1"), endpoint("10.1.0.2", condition="N")),
    )
    at = {"frontend": "10.96.0.1:80/TCP"}
    world.counters.told = [
        counted("ns/web", 3, backend="10.1.0.1:8080", **at),
        counted("ns/web", 2, **at),
        counted("ns/webber", 9, **at),
    ]
    _, found = await world.get("/detail", "service=ns/web")
    assert (found["service"], found["health"]) == ("ns/web", "warn")
    [frontend] = found["frontends"]
    assert (frontend["address"], frontend["backends"], frontend["traffic"]["connections"]) == (
        "10.96.0.1",
        ["10.1.0.1:8080"],
        5,
    )
    used, unused = found["endpoints"]
    assert (used["endpoint"], used["used"], used["traffic"]["connections"]) == ("10.1.0.1:8080", True, 3)
    assert (unused["endpoint"], unused["used"], unused["traffic"]) == ("10.1.0.2:8080", False, None)
    assert unused["cluster"] == {"words": "it is not ready", "clause": "SEL-15"}
    assert found["gone"]["connections"] == 2
    assert ["session affinity", "ClientIP, 10800 s"] in found["facts"]


@pytest.mark.parametrize("query", ["", "service=", "service=ns", "service=ns/none", "service=/", "service=%00/%ff"])
@in_loop
async def test_a_service_that_is_not_there(query):
    response, found = await World().get("/detail", query)
    assert response.status == 404
    assert "error" in found


@in_loop
async def test_explain_answers_as_the_verb_does(tmp_path):
    world = World(tmp_path)
    await world.have(web(), web_slice(endpoint("10.1.0.1")))
    response, found = await world.get("/explain", "target=10.96.0.1:80&from=pod")
    assert response.status == 200
    assert found["works"]
    assert found["answers"][0]["outcome"]["backends"][0]["backend"] == "10.1.0.1:8080"
    assert any("10.96.0.1:80/TCP" in line for line in found["text"])


@pytest.mark.parametrize(
    "query", ["", "target=what:is:this", "target=10.96.0.1:99999", "target=10.96.0.1:80&from=nobody"]
)
@in_loop
async def test_a_question_that_makes_no_sense_is_a_line_of_text(query, tmp_path):
    response, found = await World(tmp_path).get("/explain", query)
    assert response.status == 400
    assert set(found) == {"error"}


@in_loop
async def test_one_question_at_a_time(tmp_path, monkeypatch):
    world = World(tmp_path)
    release = asyncio.Event()

    async def waiting(function: Callable[..., bytes], *arguments: str) -> bytes:
        await release.wait()
        return function(*arguments)

    monkeypatch.setattr(debug_services.asyncio, "to_thread", waiting)
    first = asyncio.create_task(world.get("/explain", "target=10.96.0.1:80"))
    await asyncio.sleep(0)
    response, _ = await world.get("/explain", "target=10.96.0.1:80")
    assert response.status == 503
    release.set()
    assert (await first)[0].status == 200


@in_loop
async def test_hostile_words_stay_data(tmp_path):
    world = World(tmp_path)
    await world.have(web(selector={"app": HOSTILE}))
    world.state.trouble("compute", "Service ns/web", HOSTILE)
    for path, query in (("/data", ""), ("/detail", "service=ns/web"), ("/explain", f"target={HOSTILE}")):
        response, _ = await world.get(path, query)
        headers = dict(response.headers)
        assert headers["Content-Type"] == "application/json"
        assert headers["X-Content-Type-Options"] == "nosniff"
    [policy] = {dict((await world.get(path))[0].headers)["Content-Security-Policy"] for path in ("/", "/data")}
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy


# --- who may ask -----------------------------------------------------------------------------------------------------


def asked(method: str = "GET", path: str = "/debug/services/", **headers: str) -> Request:
    lines = {"Host": "localhost:10249", **{name.replace("_", "-"): value for name, value in headers.items()}}
    return Request(method, path, "", "".join(f"{name}: {value}\r\n" for name, value in lines.items()).encode())


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:10249", "127.0.0.1:10249", "[::1]:10249", "192.0.2.1", "node-7:10249"]
)
def test_addresses_and_the_nodes_own_names_are_fine(host):
    assert refuse(asked(Host=host), "node-7") is None


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.example",
        "evil.example:10249",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "node-70",
        "[::1",
        "a b",
    ],
)
def test_other_names_may_have_been_pointed_here_by_others(host):
    refusal = refuse(asked(Host=host), "node-7")
    assert refusal is not None
    assert refusal.status == 403


def test_two_hosts_are_none():
    request = asked()
    assert refuse(request._replace(fields=request.fields + b"Host: evil.example\r\n"), "n") is not None


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_it_only_reads(method):
    refusal = refuse(asked(method), "n")
    assert refusal is not None
    assert (refusal.status, dict(refusal.headers)["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(
    ("path", "headers", "allowed"),
    [
        ("/debug/services/", {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Dest": "document"}, True),
        ("/debug/services", {"Sec_Fetch_Site": "same-site", "Sec_Fetch_Dest": "document"}, True),
        ("/debug/services/", {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Dest": "iframe"}, False),
        ("/debug/services/data", {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Dest": "document"}, False),
        ("/debug/services/explain", {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Dest": "image"}, False),
        ("/debug/services/explain", {"Sec_Fetch_Site": "same-site", "Sec_Fetch_Dest": "empty"}, False),
        ("/debug/services/data", {"Sec_Fetch_Site": "same-origin", "Sec_Fetch_Dest": "empty"}, True),
        ("/debug/services/data", {"Sec_Fetch_Site": "none"}, True),
        ("/debug/services/data", {}, True),
    ],
)
def test_other_sites_may_link_to_the_page_and_do_nothing_else(path, headers, allowed):
    assert (refuse(asked(path=path, **headers), "n") is None) == allowed


@pytest.mark.parametrize(
    ("address", "anywhere", "serves"),
    [
        ("127.0.0.1", False, True),
        ("127.9.9.9", False, True),
        ("::1", False, True),
        ("0.0.0.0", False, False),
        ("::", False, False),
        ("192.0.2.1", False, False),
        ("192.0.2.1", True, True),
        ("0.0.0.0", True, True),
    ],
)
def test_an_address_that_others_reach_takes_a_second_word(address, anywhere, serves):
    settings = Settings(debug_page=True, debug_page_anywhere=anywhere, metrics_bind_address=HostPort(address, 10249))
    assert (not_served(settings) == "") == serves
    assert "metrics server" in not_served(msgspec.structs.replace(settings, metrics_bind_address=None))


def test_hosts():
    assert [host_of(each) for each in ("A:1", "[::1]:2", "::1", "a", " b ", "", "a:1, b")] == [
        "a",
        "::1",
        "",
        "a",
        "b",
        "",
        "",
    ]


# --- its files -------------------------------------------------------------------------------------------------------


@in_loop
async def test_the_page_is_complete_and_asks_nobody_else():
    world = World()
    response, _ = await world.get("")
    assert (response.status, dict(response.headers)["Location"]) == (308, "services/")
    response, html = await world.get("/")
    assert dict(response.headers)["Content-Type"] == "text/html; charset=utf-8"
    files = re.findall(r'(?:href|src)="(?!#)([^"]+)"', html)
    assert len(files) >= 5
    assert "<style" not in html
    assert not re.search(r"\son\w+=", html)
    texts = [html]
    for file in files:
        response, text = await world.get(f"/{file}")
        assert response.status == 200, file
        texts.append(text)
        again, _ = await world.get(f"/{file}", If_None_Match=dict(response.headers)["ETag"])
        assert (again.status, again.body) == (304, b"")
    for text in texts:
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
        assert not re.search(r"\.(innerHTML|outerHTML|insertAdjacentHTML)|document\.write|eval\(", text)
    imported = re.findall(r'from "\./([^"]+)"', "".join(texts))
    assert {f"static/{each}" for each in imported} <= set(files)


@pytest.mark.parametrize("path", ["/static/", "/static/../agent.py", "/none", "x", "/data/", "//", "/static/page.css"])
@in_loop
async def test_there_is_nothing_else(path):
    assert (await World().get(path))[0].status == 404
