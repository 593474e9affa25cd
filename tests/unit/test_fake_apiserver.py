"""The stand-in API server against recordings of a real one (tests/data/api-server-v1.36.json)."""

import asyncio
import copy
import json
from pathlib import Path

import aiohttp
import pytest

from tests.fakes.apirequests import Fault
from tests.fakes.apiserver import FakeApiServer
from tests.fakes.apistore import Store
from tests.fakes.polling import eventually
from tests.fakes.serve_api import in_thread

RECORDINGS = {
    recording["name"]: recording
    for recording in json.loads((Path(__file__).parents[1] / "data" / "api-server-v1.36.json").read_text())
}
TOKENS = {"t-admin": "admin", "t-nobody": "nobody"}
SECOND = 0.05


def recorded_store():
    """The objects that the recorded server held when it was asked for lists."""
    store = Store(version=5952)
    store.expire()
    seen = set()
    lists = ("list-services", "list-services-paged-1", "list-services-paged-2", "list-endpointslices", "get-node")
    for name in (*lists, "list-servicecidrs"):
        body = RECORDINGS[name]["response"]["body"]
        for item in body["items"]:
            value = {"kind": body["kind"].removesuffix("List"), "apiVersion": body["apiVersion"], **item}
            key = value["kind"], item["metadata"].get("namespace"), item["metadata"]["name"]
            if key not in seen:
                seen.add(key)
                store.load(value)
    return store


def recorded_server(**options):
    return FakeApiServer(
        store=recorded_store(),
        tokens=TOKENS,
        allowed=lambda user, _verb, _resource: user == "admin",
        **{"second": SECOND, **options},
    )


async def replay(server, name, *, token="t-admin", data=None):
    """Make the recorded request; the status, the headers and the body."""
    request = RECORDINGS[name]["request"]
    headers = dict(request["headers"]) | ({"Authorization": f"Bearer {token}"} if token else {})
    async with (
        aiohttp.ClientSession() as session,
        session.request(
            request["method"],
            # Word for word, percent signs included.
            aiohttp.client.URL(server.url + request["path"], encoded=True),
            headers=headers,
            data=data,
        ) as response,
    ):
        return response.status, response.headers, await response.read()


def assert_alike(name, status, headers):
    recorded = RECORDINGS[name]["response"]
    assert status == recorded["status"]
    for header in ("Content-Type", "Cache-Control", "X-Content-Type-Options", "Retry-After", "Transfer-Encoding"):
        said = headers.get(header, "").removesuffix("; charset=utf-8")
        assert said == recorded["headers"].get(header, ""), header


def run(test, **options):
    async def with_server():
        async with recorded_server(**options) as server:
            return await asyncio.wait_for(test(server), 20)

    return asyncio.run(with_server())


@pytest.mark.parametrize(
    "name",
    [
        *("list-services", "list-endpointslices", "get-node", "list-servicecidrs", "not-found"),
        *("list-services-paged-1",),
    ],
)
def test_answers_word_for_word_as_the_recorded_server(name):
    async def test(server):
        status, headers, body = await replay(server, name)
        assert_alike(name, status, headers)
        assert json.loads(body) == RECORDINGS[name]["response"]["body"]
        length = RECORDINGS[name]["response"]["headers"].get("Content-Length")
        assert headers.get("Content-Length") == length

    run(test)


def test_the_second_page_is_that_of_the_recorded_server_with_its_own_continue_token():
    async def test(server):
        await replay(server, "list-services-paged-1")
        # What changes in between isn't on the page: it is as old as the first one.
        server.delete("services", "labelled")
        status, headers, body = await replay(server, "list-services-paged-2")
        assert_alike("list-services-paged-2", status, headers)
        assert json.loads(body) == RECORDINGS["list-services-paged-2"]["response"]["body"]

    run(test)


def test_a_continue_token_expires_and_offers_a_fresh_one():
    async def test(server):
        await replay(server, "list-services-paged-1")
        server.store.expire()
        status, _, body = await replay(server, "list-services-paged-2")
        refusal = json.loads(body)
        assert (status, refusal["reason"], refusal["code"]) == (410, "Expired", 410)
        assert refusal["metadata"]["continue"]

    run(test)


@pytest.mark.parametrize(("name", "token"), [("unauthorized", ""), ("unauthorized", "bad"), ("forbidden", "t-nobody")])
def test_refuses_as_the_recorded_server(name, token):
    async def test(server):
        status, headers, body = await replay(server, name, token=token)
        assert_alike(name, status, headers)
        assert json.loads(body) == RECORDINGS[name]["response"]["body"]

    run(test)


def test_a_version_of_the_future_is_a_timeout_with_retry_after():
    async def test(server):
        server.store.version = 6588
        status, headers, body = await replay(server, "list-future")
        assert_alike("list-future", status, headers)
        assert json.loads(body) == RECORDINGS["list-future"]["response"]["body"]

    run(test)


def test_version_has_the_recorded_keys():
    async def test(server):
        status, headers, body = await replay(server, "version")
        assert_alike("version", status, headers)
        assert json.loads(body).keys() == RECORDINGS["version"]["response"]["body"].keys()

    run(test)


def test_an_event_is_created():
    recorded = RECORDINGS["create-event"]["response"]["body"]
    ours = copy.deepcopy(recorded)
    ours["metadata"] = {"name": "node1.recorded", "namespace": "default"}
    for field in ("deprecatedSource", "deprecatedFirstTimestamp", "deprecatedLastTimestamp"):
        del ours[field]

    async def test(server):
        status, headers, body = await replay(server, "create-event", data=json.dumps(ours))
        assert_alike("create-event", status, headers)
        answer = json.loads(body)
        assert answer.keys() == recorded.keys()
        # Nobody reads managedFields, and the stand-in makes none.
        assert answer["metadata"].keys() == recorded["metadata"].keys() - {"managedFields"}

    run(test)


# --- watches -------------------------------------------------------------------------------------------------


def recorded_events(name):
    lines = RECORDINGS[name]["response"]["lines"]
    assert lines[-1] == "<EOF>"
    return [json.loads(line) for line in lines[:-1]]


def without_versions(events):
    """The events with versions blanked: the recorded server counted other writes as well."""
    events = copy.deepcopy(events)
    for event in events:
        event["object"]["metadata"]["resourceVersion"] = "some"
    return events


def watched(body):
    assert body.endswith(b"\n")
    return [json.loads(line) for line in body.splitlines()]


def play_services(server):
    """What the recorded watch saw, done to the stand-in."""
    added, _, _, _ = recorded_events("watch-services")
    server.set(added["object"])
    labelled = copy.deepcopy(added["object"])
    labelled["metadata"]["labels"] = {"service.kubernetes.io/service-proxy-name": "other"}
    server.set(labelled)
    server.delete("services", "web")


def test_a_watch_from_a_version_replays_what_happened_since_as_recorded():
    async def test(server):
        play_services(server)
        status, headers, body = await replay(server, "watch-services")
        assert_alike("watch-services", status, headers)
        assert without_versions(watched(body)) == without_versions(recorded_events("watch-services"))

    run(test)


def test_a_watch_sees_live_what_happens_as_recorded():
    async def test(server):
        request = asyncio.ensure_future(replay(server, "watch-services"))
        await eventually(lambda: server.streams)
        play_services(server)
        _, _, body = await request
        assert without_versions(watched(body)) == without_versions(recorded_events("watch-services"))

    run(test, second=0.2)


def test_versions_of_a_watch_rise_with_every_event():
    async def test(server):
        play_services(server)
        _, _, body = await replay(server, "watch-services")
        versions = [int(event["object"]["metadata"]["resourceVersion"]) for event in watched(body)]
        assert versions == [6575, 6576, 6577, 6577]

    run(test)


def test_a_watch_of_slices_as_recorded():
    async def test(server):
        server.set(recorded_events("watch-endpointslices")[0]["object"])
        status, headers, body = await replay(server, "watch-endpointslices")
        assert_alike("watch-endpointslices", status, headers)
        assert without_versions(watched(body)) == without_versions(recorded_events("watch-endpointslices"))

    run(test)


def test_a_streaming_list_as_recorded():
    events = recorded_events("watch-list-services")

    async def test(server):
        server.delete("services", "web")
        request = asyncio.ensure_future(replay(server, "watch-list-services"))
        await eventually(lambda: server.streams)
        server.set(events[-1]["object"])
        status, headers, body = await request
        assert_alike("watch-list-services", status, headers)
        assert without_versions(watched(body)) == without_versions(events)

    run(test, second=0.2)


def test_an_expired_version_is_an_error_event_and_the_end():
    async def test(server):
        status, headers, body = await replay(server, "watch-expired")
        assert_alike("watch-expired", status, headers)
        assert watched(body) == recorded_events("watch-expired")

    run(test)


def test_a_service_that_loses_the_label_is_added():
    async def test(server):
        labelled = copy.deepcopy(server.store.get("services", "default", "labelled"))
        del labelled["metadata"]["labels"]
        server.set(labelled)
        _, _, body = await replay(server, "watch-services")
        first = watched(body)[0]
        assert (first["type"], first["object"]["metadata"]["name"]) == ("ADDED", "labelled")

    run(test)


# --- what a test may order -----------------------------------------------------------------------------------


def test_a_fault_hits_the_requests_it_names_and_no_other():
    async def test(server):
        server.faults.append(Fault(status=429, resource="services", headers={"Retry-After": "7"}, times=2))
        assert (await replay(server, "get-node"))[0] == 200
        first = await replay(server, "list-services")
        assert (first[0], first[1]["Retry-After"]) == (429, "7")
        assert [(await replay(server, "list-services"))[0] for _ in range(2)] == [429, 200]

    run(test)


def test_objects_are_written_over_http_and_seen_by_watches():
    async def test(server):
        url = server.url + "/api/v1/namespaces/default/services"
        headers = {"Authorization": "Bearer t-admin"}
        async with aiohttp.ClientSession(headers=headers) as session:
            body = {"metadata": {"name": "fresh"}, "spec": {"clusterIP": "10.96.0.9"}}
            assert (await session.post(url, json=body)).status == 201
            body["spec"]["clusterIP"] = "10.96.0.10"
            assert (await session.put(f"{url}/fresh", json=body)).status == 200
            found = await (await session.get(f"{url}/fresh")).json()
            assert found["spec"]["clusterIP"] == "10.96.0.10"
            assert (await session.delete(f"{url}/fresh")).status == 200
            assert (await session.get(f"{url}/fresh")).status == 404
        _, _, seen = await replay(server, "watch-services")
        assert [event["type"] for event in watched(seen)[:3]] == ["ADDED", "MODIFIED", "DELETED"]

    run(test)


def test_it_runs_in_a_thread_for_synchronous_tests():
    server = FakeApiServer()
    with in_thread(server) as call:
        call(lambda: server.set({"kind": "Node", "metadata": {"name": "n1"}}))
        assert call(lambda: len(server.store.objects("nodes"))) == 1
