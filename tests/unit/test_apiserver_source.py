"""The API source against the stand-in server: lists, watches, and everything that goes wrong with them."""

import asyncio
import dataclasses
import json
from collections.abc import Mapping

import pytest
import structlog.testing

from proxy.objects import Key
from proxy.sources.base import Resource
from proxy.sources.credentials import Credentials, Keyring
from proxy.sources.progress import Settings, State
from tests.fakes.api_source import following, service
from tests.fakes.apirequests import Fault
from tests.fakes.apiserver import FakeApiServer
from tests.fakes.apistore import RESOURCES, Store
from tests.fakes.polling import eventually

LISTING = Settings(streaming=False)
IMPATIENT = Settings(silence=0.03, answer=0.5, initial_silence=0.03)


def run(test, *, settings=Settings(), objects=(), keyring=None, **options):  # noqa: B008 - frozen
    """Run `test(server, following)` with both running."""

    async def both():
        async with FakeApiServer(**{"bookmark_every": 0, **options}) as server:
            for value in objects:
                server.set(value)
            made = keyring(server) if keyring else None
            async with following(server.url, settings=settings, keyring=made) as follower:
                await asyncio.wait_for(test(server, follower), 20)

    asyncio.run(both())


def streams(server, plural="services"):
    return [stream for stream in server.streams if stream.resource == plural]


async def watching(server, plural="services"):
    await eventually(lambda: streams(server, plural))
    return streams(server, plural)[0]


async def started(server, follower):
    """Wait until everything was listed and is watched."""
    await eventually(lambda: len(server.streams) == 4 and len(follower.sink.objects) == 4)


def queries(server, verb, plural="services") -> list[Mapping[str, str]]:
    return [request.query for request in server.requests if (request.verb, request.resource) == (verb, plural)]


def lists_of(server, plural="services"):
    """How many complete lists were asked for, streaming ones included."""
    streaming = [query for query in queries(server, "watch", plural) if "sendInitialEvents" in query]
    return len(streaming) + len(queries(server, "list", plural))


# --- what is asked for ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [Settings(), LISTING], ids=["streaming", "lists"])
def test_all_four_resources_are_listed_and_watched_with_kube_proxys_selectors_svc1_eps1_nod2_cid1(settings):
    async def test(server, follower):
        await started(server, follower)
        selectors = {}
        for plural in ("services", "endpointslices", "nodes", "servicecidrs"):
            for verb in ("list", "watch"):
                for query in queries(server, verb, plural):
                    found = query.get("labelSelector", ""), query.get("fieldSelector", "")
                    selectors.setdefault(plural, set()).add(found)
        assert selectors == {
            "services": {("!service.kubernetes.io/service-proxy-name", "spec.clusterIP!=None")},
            "endpointslices": {("!service.kubernetes.io/headless", "")},
            "nodes": {("", "metadata.name=node1")},
            "servicecidrs": {("", "")},
        }
        assert all(call == 1 for call in follower.sink.calls.values())
        assert follower.sink.names() == {"web"}
        assert follower.sink.names(Resource.SLICES) == {"web-1"}
        assert follower.sink.names(Resource.NODES) == {"node1"}
        assert follower.sink.names(Resource.SERVICE_CIDRS) == {"kubernetes"}

    labels = {"service.kubernetes.io/service-proxy-name": "other"}
    objects = [
        service("web"),
        service("headless", "None"),
        service("labelled", labels=labels),
        {"kind": "EndpointSlice", "metadata": {"name": "web-1"}, "addressType": "IPv4", "endpoints": None},
        {
            "kind": "EndpointSlice",
            "metadata": {"name": "h-1", "labels": {"service.kubernetes.io/headless": ""}},
            "addressType": "IPv4",
        },
        {"kind": "Node", "metadata": {"name": "node1"}},
        {"kind": "Node", "metadata": {"name": "node2"}},
        {"kind": "ServiceCIDR", "metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/16"]}},
    ]
    run(test, settings=settings, objects=objects)


def test_watches_ask_for_five_to_ten_minutes_and_bookmarks():
    async def test(server, _follower):
        query = (await watching(server)).query
        assert (query["timeoutSeconds"], query["allowWatchBookmarks"]) == ("450", "true")

    run(test)


def test_the_description_is_the_servers_url():
    async def test(server, follower):
        assert follower.source.description == server.url

    run(test)


# --- changes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [0, 1, 7], ids=lambda chunk: f"cut-every-{chunk}")
def test_changes_arrive_however_the_lines_are_cut(chunk):
    async def test(server, follower):
        sink = follower.sink
        await watching(server)
        server.set(service("web", "10.96.0.2"))
        server.set(service("new"))
        await eventually(lambda: sink.names() == {"web", "new"})
        await eventually(lambda: sink.objects[Resource.SERVICES][Key("default", "web")].spec.cluster_ip == "10.96.0.2")
        server.set(service("new", labels={"service.kubernetes.io/service-proxy-name": "other"}))
        server.delete("services", "web")
        await eventually(lambda: sink.names() == set())
        assert lists_of(server) == 1

    run(test, objects=[service("web")], chunk=chunk)


def test_a_line_of_a_thousand_endpoints_arrives():
    async def test(server, follower):
        await watching(server, "endpointslices")
        endpoints = [{"addresses": [f"10.1.{i >> 8}.{i & 255}"], "nodeName": f"node-{i}" * 20} for i in range(1000)]
        server.set({"kind": "EndpointSlice", "metadata": {"name": "big"}, "endpoints": endpoints})
        await eventually(lambda: follower.sink.names(Resource.SLICES) == {"big"})
        (found,) = follower.sink.objects[Resource.SLICES].values()
        assert len(found.endpoints) == 1000

    run(test)


def test_repeated_and_reordered_events_leave_the_newest_state():
    async def test(server, follower):
        stream = await watching(server)
        old = server.set(service("web", "10.96.0.1"))
        new = server.set(service("web", "10.96.0.2"))
        stream.event({"type": "MODIFIED", "object": new})
        stream.event({"type": "MODIFIED", "object": old})
        server.set(service("last"))
        await eventually(lambda: "last" in follower.sink.names())
        assert follower.sink.objects[Resource.SERVICES][Key("default", "web")].spec.cluster_ip == "10.96.0.2"
        assert lists_of(server) == 1

    run(test)


def test_an_unknown_kind_of_event_is_passed_over():
    async def test(server, follower):
        stream = await watching(server)
        stream.event({"type": "SURPRISE", "object": service("no")})
        server.set(service("yes"))
        await eventually(lambda: follower.sink.names() == {"yes"})

    run(test)


# --- ends and failures of a watch ----------------------------------------------------------------------------


async def resumed(server, follower, break_stream):
    """Break the watch of Services, change something, and wait for the next watch; its query."""
    stream = await watching(server)
    server.set(service("before"))
    before = server.store.version
    await eventually(lambda: "before" in follower.sink.names())
    break_stream(stream)
    await eventually(lambda: stream not in server.streams)
    server.set(service("after"))
    await watching(server)
    return before, queries(server, "watch")[-1]


@pytest.mark.parametrize(
    "break_stream",
    [
        lambda stream: stream.end(),
        lambda stream: stream.abort(),
        lambda stream: (stream.write(b'{"type":"ADDED","object":{"metad'), stream.abort()),
        lambda stream: (stream.write(b'{"type":"ADDED","object":{"metad'), stream.end()),
        lambda stream: (stream.write(b"\xff\x00 no json\n"), stream.end()),
        lambda stream: stream.event({"type": "ERROR", "object": {"kind": "Status", "code": 500, "message": "boom"}}),
        lambda stream: stream.event({"type": "ERROR", "object": {"kind": "Status", "code": 429, "message": "later"}}),
    ],
    ids=["end", "reset", "eof-in-a-line", "end-in-a-line", "garbage", "error-event", "throttled"],
)
def test_a_watch_that_ends_is_resumed_from_the_last_version_without_a_list(break_stream):
    async def test(server, follower):
        before, query = await resumed(server, follower, break_stream)
        assert query["resourceVersion"] == str(before)
        await eventually(lambda: follower.sink.names() == {"before", "after"})
        assert lists_of(server) == 1
        assert follower.sink.calls["replace", Resource.SERVICES] == 1

    run(test, settings=Settings(answer=1.0))


def test_an_orderly_end_in_the_middle_of_an_event_is_a_failure():
    async def test(server, follower):
        stream = await watching(server)
        server.set(service("web"))
        stream.write(b'{"type":"ADDED","obj')
        stream.end()
        await eventually(lambda: follower.naps == [0.8])

    run(test)


def test_the_servers_own_end_of_a_stream_is_followed_without_a_pause():
    async def test(server, follower):
        stream = await watching(server)
        server.set(service("web"))
        await eventually(lambda: follower.sink.names() == {"web"})
        stream.end()
        await eventually(lambda: len(queries(server, "watch")) == 2)
        assert follower.naps == []

    run(test)


def test_a_bookmark_moves_the_version_on():
    async def test(server, _follower):
        stream = await watching(server)
        server.set({"kind": "Node", "metadata": {"name": "elsewhere"}})
        server.bookmark()
        stream.end()
        await eventually(lambda: len(queries(server, "watch")) == 2)
        assert queries(server, "watch")[-1]["resourceVersion"] == str(server.store.version)

    run(test)


def test_a_silent_watch_is_opened_anew_without_a_list():
    async def test(server, follower):
        stream = await watching(server)
        stream.stalled = True
        server.set(service("web"))
        await eventually(lambda: follower.sink.names() == {"web"})
        assert lists_of(server) == 1

    run(test, settings=IMPATIENT)


def test_a_watch_that_ends_at_once_again_and_again_is_paced():
    async def test(server, follower):
        await eventually(lambda: len(queries(server, "watch")) > 4)
        assert {0.8, 1.6, 3.2} <= set(follower.naps)
        assert lists_of(server) == 1

    run(test, settings=LISTING, second=0.0)


# --- versions that are gone ----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [Settings(), LISTING], ids=["streaming", "lists"])
def test_an_expired_version_in_a_watch_means_a_fresh_list(settings):
    async def test(server, follower):
        stream = await watching(server)
        stream.stalled = True
        server.delete("services", "old")
        server.set(service("new"))
        server.store.expire()
        stream.end()
        await eventually(lambda: follower.sink.names() == {"new"})
        assert lists_of(server) == 2
        assert follower.sink.calls["replace", Resource.SERVICES] == 2

    run(test, settings=settings, objects=[service("old")])


def test_an_expired_version_is_the_way_of_the_world_and_asks_for_nothing_to_be_done():
    async def test(server, follower):
        stream = await watching(server)
        stream.stalled = True
        server.set(service("new"))
        server.store.expire()
        stream.end()
        await eventually(lambda: follower.sink.names() == {"new"})

    with structlog.testing.capture_logs() as logs:
        run(test)
    [lost] = [entry for entry in logs if entry["event"] == "lost" and "(410)" in entry["why"]]
    assert lost["log_level"] == "debug"
    assert lost["do"].startswith("nothing")


def test_an_expired_version_as_http_status_means_a_fresh_list():
    async def test(server, follower):
        await watching(server)
        server.faults.append(Fault(verb="watch", resource="services", status=410))
        streams(server)[0].end()
        await eventually(lambda: lists_of(server) == 2)
        await eventually(lambda: follower.source.statistics()[Resource.SERVICES].state is State.WATCHING)

    run(test)


@pytest.mark.parametrize("settings", [Settings(), LISTING], ids=["streaming", "lists"])
def test_a_list_refused_as_expired_is_asked_for_again_without_a_version(settings):
    async def test(server, _follower):
        await watching(server)
        verb = "watch" if settings.streaming else "list"
        server.faults.append(Fault(verb="watch", resource="services", status=410))
        server.faults.append(Fault(verb=verb, resource="services", status=410))
        streams(server)[0].end()
        await eventually(lambda: lists_of(server) == 3)
        last = [query for query in queries(server, verb) if settings.streaming is ("sendInitialEvents" in query)]
        assert "resourceVersion" in last[1]
        assert "resourceVersion" not in last[2]

    run(test, settings=settings, objects=[service("web")])


@pytest.mark.parametrize("settings", [Settings(), LISTING], ids=["streaming", "lists"])
def test_a_store_restored_to_the_past_is_listed_as_it_is_now(settings):
    async def test(server, follower):
        stream = await watching(server)
        server.bookmark()
        statistics = follower.source.statistics
        await eventually(lambda: statistics()[Resource.SERVICES].version == str(server.store.version))
        server.store = Store(version=5)
        server.set(service("restored"))
        stream.stalled = True
        # From the lost future nothing comes, and no bookmark either.
        await eventually(lambda: follower.sink.names() == {"restored"})
        asked = [query.get("resourceVersion") for query in queries(server, "watch" if settings.streaming else "list")]
        assert asked[-1] is None

    fast = Settings(silence=0.03, streaming=settings.streaming)
    run(test, settings=fast, objects=[service(f"s{number}") for number in range(20)])


def test_one_version_whose_streams_always_break_leads_to_a_list():
    async def test(server, follower):
        for _ in range(3):
            stream = await watching(server)
            stream.write(b"this is no event\n")
            await eventually(lambda broken=stream: broken not in server.streams)
        await eventually(lambda: follower.sink.calls["replace", Resource.SERVICES] == 2)
        assert lists_of(server) == 2

    run(test)


def test_a_server_that_expires_every_version_gets_at_most_one_list_per_delay():
    async def test(server, follower):
        await eventually(lambda: lists_of(server) >= 6)
        assert lists_of(server) <= len([nap for nap in follower.naps if nap < 500]) + 1
        assert follower.naps[:5] == [0.8, 1.6, 3.2, 6.4, 12.8]

    faults = [Fault(verb="watch", resource="services", status=410, times=1000)]

    async def both():
        async with FakeApiServer(bookmark_every=0) as server:
            server.faults += faults
            async with following(server.url, settings=LISTING) as follower:
                await asyncio.wait_for(test(server, follower), 20)

    asyncio.run(both())


# --- lists ---------------------------------------------------------------------------------------------------


def many(count):
    return [service(f"s{number:04}") for number in range(count)]


def test_a_list_comes_in_pages():
    async def test(server, follower):
        await watching(server)
        assert len(follower.sink.names()) == 25
        await start_over(server)
        await eventually(lambda: follower.sink.calls["replace", Resource.SERVICES] == 2)
        assert len([query for query in queries(server, "list") if "continue" in query]) == 2
        assert len(follower.sink.names()) == 25

    run(test, settings=Settings(streaming=False, page=10), objects=many(25))


async def start_over(server):
    """Make the client list without a version, and so in pages."""
    server.faults.append(Fault(verb="watch", resource="services", status=410))
    server.faults.append(Fault(verb="list", resource="services", status=410))
    streams(server)[0].end()


def test_a_continue_token_that_expires_means_one_whole_list():
    async def test(server, follower):
        await watching(server)
        server.faults.append(Fault(verb="watch", resource="services", status=410))
        server.faults.append(Fault(verb="list", resource="services", status=410))
        original = server.store.page

        def expiring(plural, selector, limit, token):
            if token:
                server.store.expire()
            return original(plural, selector, limit, token)

        server.store.page = expiring
        streams(server)[0].end()
        await eventually(lambda: follower.sink.calls["replace", Resource.SERVICES] == 2)
        assert len(follower.sink.names()) == 25
        assert "limit" not in queries(server, "list")[-1]

    run(test, settings=Settings(streaming=False, page=10), objects=many(25))


@pytest.mark.parametrize("streaming", ["refused", "ignored"])
def test_a_server_without_streaming_lists_is_asked_for_plain_ones(streaming):
    async def test(server, follower):
        await eventually(lambda: follower.sink.names() == {"web"})
        assert "resourceVersion" in queries(server, "list")[0]
        await watching(server)
        server.set(service("new"))
        await eventually(lambda: follower.sink.names() == {"web", "new"})

    run(test, settings=Settings(initial_silence=0.05), objects=[service("web")], streaming=streaming)


def test_a_server_that_ignores_the_request_for_a_streaming_list_is_found_out_though_it_is_never_silent():
    async def churn(server):
        while True:
            server.set(service("busy", "10.96.0.9"))
            await asyncio.sleep(0.01)

    async def test(server, follower):
        async with asyncio.TaskGroup() as group:
            changes = group.create_task(churn(server))
            await eventually(lambda: "list" in server.verbs("services") or follower.sink.names())
            await eventually(lambda: follower.sink.names() >= {"web", "busy"})
            changes.cancel()

    run(
        test,
        settings=Settings(initial_silence=1),
        objects=[service("web")],
        streaming="ignored",
        bookmark_every=0.2,
    )


@pytest.mark.parametrize(
    "fault",
    [
        Fault(resource="services", close=True, times=2),  # aiohttp itself tries once more
        Fault(resource="services", hang=True),
        Fault(resource="services", status=500),
        Fault(resource="services", status=502, body=b"<html>Bad Gateway</html>"),
        Fault(resource="services", status=200, body=b"<html>a portal</html>"),
        Fault(resource="services", status=302, headers={"Location": "http://127.0.0.1:1/"}),
        Fault(resource="services", status=403),
        Fault(resource="services", verb="list", truncate=40),
    ],
    ids=["close", "hang", "500", "502", "portal", "redirect", "403", "truncated"],
)
@pytest.mark.parametrize("streaming", [True, False], ids=["streaming", "lists"])
def test_a_list_that_fails_is_reported_by_nobody_and_tried_again(fault, streaming):
    async def test(server, follower):
        await eventually(lambda: follower.sink.names() == {"web"})
        assert follower.sink.calls["replace", Resource.SERVICES] == 1
        if fault.truncate and streaming:
            return
        assert follower.naps[0] == pytest.approx(0.8)

    async def both():
        async with FakeApiServer(bookmark_every=0) as server:
            server.set(service("web"))
            server.faults.append(dataclasses.replace(fault))
            settings = Settings(streaming=streaming, answer=0.2)
            async with following(server.url, settings=settings) as follower:
                await asyncio.wait_for(test(server, follower), 20)

    asyncio.run(both())


def test_retry_after_is_kept_and_delays_grow_and_end_at_the_longest():
    async def test(server, follower):
        await eventually(lambda: follower.sink.names() == {"web"})
        assert follower.naps == [7, 1.6, 3.2, 6.4, 12.8, 25.6, 30, 30]

    async def both():
        async with FakeApiServer(bookmark_every=0) as server:
            server.set(service("web"))
            server.faults.append(Fault(resource="services", status=429, headers={"Retry-After": "7"}))
            server.faults.append(Fault(resource="services", status=503, times=7))
            async with following(server.url) as follower:
                await asyncio.wait_for(test(server, follower), 20)

    asyncio.run(both())


def test_no_server_is_left_alone_for_longer_than_five_minutes():
    busy = {"kind": "Status", "code": 429, "message": "busy", "details": {"retryAfterSeconds": 1e9}}

    async def both():
        async with FakeApiServer(bookmark_every=0) as server:
            server.faults.append(Fault(resource="services", status=429, body=json.dumps(busy).encode()))
            server.faults.append(Fault(resource="services", status=429, headers={"Retry-After": "86400"}))
            async with following(server.url) as follower:
                await eventually(lambda: Resource.SERVICES in follower.sink.objects)
                assert follower.naps == [300, 300]

    asyncio.run(both())


# --- the server is away --------------------------------------------------------------------------------------


def test_what_was_reported_holds_while_the_server_is_away_and_goes_on_without_a_list():
    async def test(server, follower):
        await started(server, follower)
        calls = follower.sink.calls.copy()
        await server.stop()
        await eventually(lambda: len(follower.naps) > 12)
        assert follower.sink.calls == calls
        assert follower.sink.names() == {"web"}
        statistics = follower.source.statistics()[Resource.SERVICES]
        assert statistics.state is State.WAITING
        assert "connection refused" in statistics.error
        await server.start()
        server.set(service("new"))
        await eventually(lambda: follower.sink.names() == {"web", "new"})
        assert lists_of(server) == 1

    run(test, objects=[service("web")])


def test_changes_of_state_are_logged_once_and_events_never():
    async def test(server, follower):
        await started(server, follower)
        await server.stop()
        await eventually(lambda: len(follower.naps) > 20)
        await server.start()
        server.set(service("new"))
        await eventually(lambda: follower.sink.names() == {"new"} and len(server.streams) == 4)

    with structlog.testing.capture_logs() as logs:
        run(test)
    above_debug = [entry for entry in logs if entry["log_level"] != "debug" and entry["resource"] == "services"]
    assert above_debug[0]["event"] == "listed"
    assert above_debug[-1]["event"] == "connected"
    lost = [entry for entry in above_debug if entry["event"] == "lost"]
    # First how the connection went, then that there is no other.
    assert 1 <= len(lost) <= 2
    assert all(entry["why"] and entry["retry_in"] > 0 for entry in lost)


def test_a_connection_that_ends_after_a_while_is_no_news_unless_there_is_no_other():
    now = [1000.0]

    async def test(server, follower):
        await started(server, follower)
        for _ in range(3):
            now[0] += 50.0  # as behind a load balancer that ends what is idle
            for stream in list(server.streams):
                stream.abort()
            seen = len(queries(server, "watch"))
            await eventually(lambda seen=seen: len(server.streams) == 4 and len(queries(server, "watch")) > seen)
        assert [entry["event"] for entry in logs if entry["log_level"] != "debug"] == ["listed"] * 4
        assert set(follower.naps) == {0.8}, "what has lasted is no failure that makes the next pause longer"
        now[0] += 50.0
        await server.stop()
        await eventually(lambda: len(follower.naps) > 40)
        await server.start()
        await eventually(lambda: len(server.streams) == 4)
        told = [entry for entry in logs if entry["log_level"] != "debug"][4:]
        assert {entry["event"] for entry in told} == {"lost", "connected"}
        assert all(entry["why"].startswith("cannot connect to") for entry in told if entry["event"] == "lost")

    async def both():
        async with FakeApiServer(bookmark_every=0) as server:
            server.set(service("web"))
            async with following(server.url, clock=lambda: now[0]) as follower:
                await asyncio.wait_for(test(server, follower), 20)

    with structlog.testing.capture_logs() as logs:
        asyncio.run(both())


# --- objects that are wrong ----------------------------------------------------------------------------------


def broken_service(name):
    value = service(name)
    value["spec"]["ports"] = [{"port": "eighty"}]
    return value


@pytest.mark.parametrize("settings", [Settings(), LISTING], ids=["streaming", "lists"])
def test_a_malformed_item_of_a_list_costs_that_item_alone(settings):
    async def test(server, follower):
        sink = follower.sink
        await eventually(lambda: sink.names() == {"good", "fine"})
        ((origin, subject), reason) = next(iter(sink.troubles.items()))
        assert (origin, subject) == ("api", "services default/bad")
        assert reason.startswith("spec.ports[0].port")
        await watching(server)
        server.set(service("bad"))
        await eventually(lambda: sink.names() == {"good", "fine", "bad"} and not sink.troubles)

    run(test, settings=settings, objects=[service("good"), broken_service("bad"), service("fine")])


def test_a_malformed_update_keeps_the_older_form_through_lists_until_the_object_goes():
    async def test(server, follower):
        sink = follower.sink
        await watching(server)
        server.set(broken_service("web"))
        await eventually(lambda: sink.troubles)
        assert sink.names() == {"web", "gone"}
        streams(server)[0].stalled = True
        server.delete("services", "gone")
        server.set(service("new"))
        server.store.expire()
        streams(server)[0].end()
        await eventually(lambda: sink.names() == {"web", "new"})
        assert ("api", "services default/web") in sink.troubles
        await watching(server)
        server.delete("services", "web")
        await eventually(lambda: sink.names() == {"new"} and not sink.troubles)

    run(test, objects=[service("web"), service("gone")])


def test_an_object_without_a_readable_name_is_named_as_such():
    async def test(server, follower):
        stream = await watching(server)
        stream.event({"type": "ADDED", "object": {"metadata": {"name": 5}}})
        stream.event({"type": "ADDED", "object": {"metadata": {"name": "two\nlines"}, "spec": 5}})
        stream.event({"type": "ADDED", "object": 7})
        server.set(service("web"))
        await eventually(lambda: follower.sink.names() == {"web"})
        assert {subject for _, subject in follower.sink.troubles} == {
            "services without a name",
            "services 'two\\nlines'",
        }

    run(test)


def test_a_complaint_ends_with_the_list_that_lacks_the_object():
    async def test(server, follower):
        await eventually(lambda: follower.sink.troubles)
        stream = await watching(server)
        stream.stalled = True
        server.delete("services", "bad")
        server.store.expire()
        stream.end()
        await eventually(lambda: not follower.sink.troubles)

    run(test, objects=[broken_service("bad")])


@pytest.mark.parametrize("settings", [Settings(), LISTING], ids=["streaming", "lists"])
def test_a_list_in_doubt_is_read_again_after_five_seconds_and_not_reported_before(settings):
    async def test(server, follower):
        await started(server, follower)
        follower.sink.doubts = [True, True]
        server.faults.append(Fault(verb="watch", resource="services", status=410))
        streams(server)[0].end()
        await eventually(lambda: follower.sink.calls["replace", Resource.SERVICES] == 2)
        assert follower.naps.count(5.0) == 2
        assert lists_of(server) == 4
        # Not from a cache, which may be what was wrong.
        last = queries(server, "watch" if settings.streaming else "list")[-1]
        assert "resourceVersion" not in last

    run(test, settings=settings, objects=[service("web")])


# --- servers with less ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["404", "403"])
def test_servicecidrs_that_are_not_served_are_none_and_tried_rarely(how):
    options = (
        {"served": frozenset(RESOURCES) - {"servicecidrs"}}
        if how == "404"
        else {"allowed": lambda _user, _verb, resource: resource != "servicecidrs"}
    )

    async def test(server, follower):
        await eventually(lambda: len(follower.naps) > 2)
        assert set(follower.naps) == {600.0}
        assert follower.sink.objects[Resource.SERVICE_CIDRS] == {}
        assert follower.sink.calls["replace", Resource.SERVICE_CIDRS] == 1
        assert follower.source.statistics()[Resource.SERVICE_CIDRS].state is State.NOT_SERVED
        server.served, server.allowed = frozenset(RESOURCES), lambda *_: True
        server.set({"kind": "ServiceCIDR", "metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/16"]}})
        await eventually(lambda: follower.sink.names(Resource.SERVICE_CIDRS) == {"kubernetes"})

    run(test, **options)


def test_what_is_not_served_is_logged_once():
    async def test(_server, follower):
        await eventually(lambda: len(follower.naps) > 5)

    with structlog.testing.capture_logs() as logs:
        run(test, served=frozenset(RESOURCES) - {"servicecidrs"})
    assert [entry["event"] for entry in logs if entry["resource"] == "servicecidrs"] == ["not served"]


def test_services_that_are_forbidden_are_asked_for_again_and_the_others_go_on():
    async def test(server, follower):
        await eventually(lambda: follower.sink.names(Resource.NODES) == {"node1"})
        await eventually(lambda: len(follower.naps) > 2)
        assert Resource.SERVICES not in follower.sink.objects
        assert "services is forbidden" in follower.source.statistics()[Resource.SERVICES].error
        server.allowed = lambda *_: True
        await eventually(lambda: follower.sink.names() == {"web"})

    node = {"kind": "Node", "metadata": {"name": "node1"}}
    run(test, objects=[service("web"), node], allowed=lambda _user, _verb, resource: resource != "services")


# --- credentials ---------------------------------------------------------------------------------------------


def test_a_refused_token_is_renewed_and_the_request_made_again_at_once():
    loads = []

    def keyring(server):
        async def again():
            loads.append(1)
            return Credentials(server=server.url, authorization="Bearer fresh")

        # The first read was long ago, by the clock of the keyring.
        times = iter([0.0, *range(100, 100_000, 100)])
        return Keyring(Credentials(server=server.url, authorization="Bearer stale"), again, clock=lambda: next(times))

    async def test(server, follower):
        await eventually(lambda: follower.sink.names() == {"web"} and len(server.streams) == 4)
        assert follower.naps == []
        assert {request.user for request in server.requests} == {"", "node"}
        assert loads == [1]

    run(test, objects=[service("web")], tokens={"fresh": "node"}, keyring=keyring)


def test_a_redirect_takes_no_token_elsewhere():
    async def test(server, follower):
        await eventually(lambda: len(follower.naps) > 1)
        assert not [request for request in elsewhere_requests if request.headers.get("Authorization")]

    elsewhere_requests = []

    async def both():
        async with FakeApiServer() as elsewhere, FakeApiServer(tokens={"t": "node"}) as server:
            elsewhere.requests = elsewhere_requests
            location = {"Location": f"{elsewhere.url}/api/v1/services"}
            server.faults.append(Fault(status=302, headers=location, times=1000))
            credentials = Credentials(server=server.url, authorization="Bearer t")

            async def same():
                return credentials

            async with following(server.url, keyring=Keyring(credentials, same)) as follower:
                await asyncio.wait_for(test(server, follower), 20)
            assert elsewhere_requests == []

    asyncio.run(both())


# --- statistics ----------------------------------------------------------------------------------------------


def test_statistics_tell_how_each_resource_is_followed():
    async def test(server, follower):
        before = follower.source.statistics()
        assert before[Resource.NODES].listed is None
        await started(server, follower)
        server.set(service("web"))
        await eventually(lambda: follower.sink.names() == {"web"})
        after = follower.source.statistics()[Resource.SERVICES]
        assert after.state is State.WATCHING
        assert (after.lists, after.watches, after.version) == (1, 1, str(server.store.version))
        assert None not in (after.listed, after.changed, after.lag)
        assert after.error == ""
        with pytest.raises(AttributeError):
            after.lists = 5
        assert json.dumps({name: str(getattr(after, name)) for name in after.__struct_fields__})

    run(test)
