"""What clients ask, of the HTTP servers, of the agent's socket and of `explain`; and whole inputs, up to what is shown.

An answer may be a refusal, and nothing else is raised.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import itertools
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import click
import msgspec

from proxy.bundle import verbs as bundle_verbs
from proxy.config.settings import Settings
from proxy.counting import Off
from proxy.desired import Desired
from proxy.dump import Filter
from proxy.explain.answer import answer
from proxy.explain.asked import AskedService, parse_asked, parse_client
from proxy.explain.data import to_data
from proxy.explain.gather import Means, UnanswerableError
from proxy.explain.manifests import from_manifests
from proxy.explain.surroundings import Surroundings
from proxy.explain.text import lines
from proxy.flows import Chosen
from proxy.objects import Key
from proxy.render import render
from proxy.serving import pages
from proxy.serving.agent_server import RefusedError, decode_request
from proxy.serving.answers import Answers
from proxy.serving.debug_services import PREFIX, Node, ServicesPage
from proxy.serving.health import ProxyHealth
from proxy.serving.messages import RequestError, Response, compose, parse
from proxy.serving.metrics import Metrics
from proxy.serving.servers import MetricsPages, health_handler
from proxy.sources.base import Resource
from proxy.sources.manifest_loading import loads
from proxy.sources.manifest_objects import FileError, merge
from proxy.sources.manifest_objects import parse as parse_manifest
from proxy.state import State
from rules.forwarding import Family, check_route, parse_address
from tests.fuzz.peers import SEPARATOR, archive_of, file_with

_NODE = "node1"
_EXAMPLE = Path(__file__).parents[1] / "data" / "explain" / "cluster.yaml"


@functools.cache
def _runner() -> asyncio.Runner:
    return asyncio.Runner()


def _awaited(work: Coroutine[Any, Any, Any]) -> Any:
    return _runner().run(work)


@functools.cache
def _loaded() -> Any:
    return loads("cluster.yaml", _EXAMPLE.read_bytes())


@functools.cache
def _desired() -> tuple[Settings, State, Desired]:
    """Some Services, as an agent has them."""
    settings = Settings(mode="nftables", run_directory="/nowhere", manifests="x", node_port_addresses=("primary",))
    state = State(_NODE)
    desired = Desired(settings, _NODE, state, tuple(Family))
    desired.set_interfaces({"eth0": (parse_address("192.0.2.1"),)})
    state.replace(Resource.SLICES, _loaded().slices)
    state.replace(Resource.SERVICES, _loaded().services)
    _awaited(desired.refresh())
    return settings, state, desired


@functools.cache
def _handlers() -> tuple[Callable[[Any], Any], ...]:
    """Of the ports for health and for metrics, with the page about Services."""
    settings, state, desired = _desired()
    nothing: Any = _Nothing
    now = itertools.count(100.0)
    page = ServicesPage(
        settings,
        Node(name=_NODE, version="1", mode="nftables", source="manifests x", families=tuple),
        state,
        desired,
        families=tuple(Family),
        counters=Off(),
        means=Means(nothing, lambda *_: Surroundings(), nothing),
        clock=lambda: next(now),
    )
    metrics = Metrics("nftables", "1")
    return (
        health_handler(ProxyHealth(60.0), metrics),
        MetricsPages(settings, metrics, "nftables", "1", page=page.answer).answer,
    )


class _Nothing:
    """A dataplane, or a table of flows, that holds nothing."""

    flows = staticmethod(lambda *_: iter(()))

    def __init__(self, *_: object) -> None: ...

    def read(self) -> None: ...

    def close(self) -> None: ...


def http_answers(data: bytes) -> None:
    """Requests to the ports of health and metrics, and what they are answered."""
    with contextlib.suppress(RequestError):
        if (found := parse(data, 64)) is not None:
            for handler in _handlers():
                response = handler(found.request)
                if not isinstance(response, Response):
                    response = _awaited(response)
                head, _, _ = compose(response, found.request.method, 0.0).partition(b"\r\n\r\n")
                assert head.count(b"\r\n") == len(response.headers) + 4, head


def page_questions(data: bytes) -> None:
    """Questions of the page about Services: a path and its query."""
    path, _, query = data.partition(b"\n")
    for each in (path, b"/detail", b"/explain", b"/events"):
        target = PREFIX.encode() + each + b"?" + query
        http_answers(b"GET %b HTTP/1.1\r\nHost: localhost\r\n\r\n" % bytes(one for one in target if one > 32))
    pages.flag_values(data.decode(errors="replace").split("\n"))


@functools.cache
def _answers() -> Answers:
    settings, state, desired = _desired()

    class Source:
        description = "fuzz"

        def followed(self) -> list[Any]:
            return []

    return Answers(
        settings=settings,
        node_name=_NODE,
        source=Source(),  # type: ignore[arg-type]  # it is asked for no more
        state=state,
        desired=desired,
        syncs=[],
        health=ProxyHealth(60.0),
    )


def agent_verbs(data: bytes) -> None:
    """What verbs ask the agent, and what it answers."""

    answers = _answers()

    async def ask() -> None:
        request = decode_request(data)
        async for kind, value in answers.answer(request.verb, request.arguments):
            assert kind in ("part", "result")
            msgspec.json.encode(value)

    with contextlib.suppress(RefusedError):
        _awaited(ask())


def explain_questions(data: bytes) -> None:
    """What `explain` is asked, and its answer, of the Services of an example."""
    target, _, rest = data.decode(errors="replace").partition("\n")
    client, _, interface = rest.partition("\n")
    with contextlib.suppress(ValueError, UnanswerableError):
        asked, who = parse_asked(target), parse_client(client, interface)
        found = answer(asked, who, from_manifests(_loaded(), Settings(), _NODE, asked))
        assert list(lines(found))
        msgspec.json.encode(to_data(found))


_SETTINGS = (
    Settings(hostname_override=_NODE),
    Settings(hostname_override=_NODE, mode="nftables", detect_local_mode="NodeCIDR", node_port_addresses=("primary",)),
)


def objects_to_tables(data: bytes) -> None:
    """Objects as an API server has them, up to the tables of a node that has them: a bad one spoils no other."""
    try:
        loaded = merge({"fuzz.json": parse_manifest("fuzz.json", data, lambda each: each)})
    except FileError:
        return
    for settings in _SETTINGS:
        rendered = render(loaded, settings, _NODE)
        assert all("\n" not in each for each in rendered.problems), rendered.problems
        for table in rendered.tables:
            for frontend, route in table.routes.items():
                assert check_route(table.family, frontend, route) is None
    for service in loaded.services[:1]:
        asked = AskedService(Key(service.key.namespace, service.key.name), "")
        evidence = from_manifests(loaded, _SETTINGS[0], _NODE, asked)
        with contextlib.suppress(UnanswerableError):
            assert list(lines(answer(asked, parse_client(""), evidence)))


def bundle_answers(data: bytes) -> None:
    """A bundle of strangers, asked by every verb that reads one: they end with a code and with lines."""
    name = file_with(archive_of(data.split(SEPARATOR)))
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), contextlib.suppress(click.UsageError):
        for code in (
            bundle_verbs.dump(name, "wide", Filter()),
            bundle_verbs.dump(name, "json", Filter()),
            bundle_verbs.verify(name, "text"),
            bundle_verbs.doctor(name, "text"),
            bundle_verbs.status(name, "text"),
            bundle_verbs.conntrack(name, "table", Chosen("", b"", stale=False)),
            bundle_verbs.explain(name, "10.96.0.1:80", ""),
            bundle_verbs.explain(name, "default/web", ""),
        ):
            assert code in (0, 1, 2)


TARGETS: tuple[Callable[[bytes], None], ...] = (
    *(http_answers, page_questions, agent_verbs, explain_questions),
    *(objects_to_tables, bundle_answers),
)
