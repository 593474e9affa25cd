"""Events on the Node and on Services: CFG-56, CFG-55, HC-21."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from proxy import events
from proxy.events import Recorder, Writer, manifest
from proxy.objects import Key
from proxy.sources.manifests import ManifestSource
from tests.fakes.api_source import following
from tests.fakes.apirequests import Fault
from tests.fakes.apiserver import FakeApiServer
from tests.fakes.polling import eventually

SVC = Key("default", "web")
DEADLINE = 20.0


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Taking:
    """A writer that remembers what it is given."""

    def __init__(self, trouble=None):
        self.written = []
        self.trouble = trouble
        self.hold = asyncio.Event()
        self.hold.set()

    async def create(self, path, body):
        await self.hold.wait()
        self.written.append((path, msgspec.json.decode(body)))
        return self.trouble


def run(test):
    """Run a coroutine for a test, with a deadline."""

    async def bounded():
        async with asyncio.timeout(DEADLINE):
            await test()

    asyncio.run(bounded())


async def running(recorder, writer):
    """The task that writes."""
    task = asyncio.create_task(recorder.run(writer))
    await asyncio.sleep(0)
    return task


MOMENT = 1_795_202_886_840_347_833


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (
            events.starting("node1"),
            {"reason": "Starting", "action": "StartKubeProxy", "type": "Normal", "note": ""},
        ),
        (
            events.server_not_started("node1", "health", "why"),
            {
                "reason": "FailedToStartProxierHealthcheck",
                "action": "StartKubeProxy",
                "type": "Warning",
                "note": "why",
            },
        ),
        (
            events.server_not_started("node1", "metrics", "why"),
            {"reason": "FailedToStartMetricServer", "action": "StartKubeProxy", "type": "Warning", "note": "why"},
        ),
        (events.ipvs_deprecated("node1"), {"reason": "IPVSDeprecation", "type": "Warning"}),
    ],
)
def test_cfg_56_events_of_the_node(event, expected):
    found = manifest(event, instance="kube-proxy-node1", nanoseconds=MOMENT)
    assert expected.items() <= found.items()
    assert found["regarding"] == {"kind": "Node", "name": "node1", "uid": "node1"}
    assert found["metadata"] == {"name": f"node1.{MOMENT:x}", "namespace": "default"}
    assert (found["reportingController"], found["reportingInstance"]) == ("kube-proxy", "kube-proxy-node1")
    assert found["eventTime"] == "2026-11-20T19:28:06.840347Z"


def test_hc_21_the_event_of_a_service():
    event = events.health_check_not_started("node1", SVC, 32000, "Address already in use")
    found = manifest(event, instance="kube-proxy-node1", nanoseconds=MOMENT)
    assert found["note"] == (
        'node node1 failed to start healthcheck "default/web" on port 32000: Address already in use'
    )
    assert (found["reason"], found["action"], found["type"]) == (
        "FailedToStartServiceHealthcheck",
        "Listen",
        "Warning",
    )
    assert found["regarding"] == {"kind": "Service", "namespace": "default", "name": "web", "uid": "default/web"}
    assert found["metadata"]["namespace"] == "default"


def test_notes_and_names_fit_what_servers_take():
    event = events.server_not_started("n" * 253, "health", "x" * 5000)
    found = manifest(event, instance="kube-proxy-" + "n" * 253, nanoseconds=MOMENT)
    assert len(found["note"]) == 1024
    assert len(found["metadata"]["name"]) <= 253
    assert len(found["reportingInstance"]) == 128


def test_an_event_is_written_once_for_some_minutes():
    async def test():
        clock, outcomes, writer = Clock(), [], Taking()
        recorder = Recorder("node1", told=outcomes.append, clock=clock)
        task = await running(recorder, writer)
        for _ in range(3):
            recorder.record(events.health_check_not_started("node1", SVC, 1, "taken"))
        recorder.record(events.health_check_not_started("node1", SVC, 2, "taken"))
        clock.now += events.AGAIN
        recorder.record(events.health_check_not_started("node1", SVC, 1, "taken"))
        await recorder.settled(DEADLINE)
        assert [value["note"].split()[-2] for _, value in writer.written] == ["1:", "2:", "1:"]
        assert outcomes.count("repeated") == 2
        assert outcomes.count("recorded") == 3
        task.cancel()

    run(test)


def test_many_events_are_rate_limited():
    async def test():
        clock, outcomes, writer = Clock(), [], Taking()
        recorder = Recorder("node1", told=outcomes.append, clock=clock)
        task = await running(recorder, writer)
        for port in range(1, 101):
            recorder.record(events.health_check_not_started("node1", SVC, port, "taken"))
        await recorder.settled(DEADLINE)
        assert (len(writer.written), outcomes.count("dropped")) == (events.BURST, 100 - events.BURST)
        clock.now += 3 * events.EVERY
        for port in range(101, 111):
            recorder.record(events.health_check_not_started("node1", SVC, port, "taken"))
        await recorder.settled(DEADLINE)
        assert len(writer.written) == events.BURST + 3
        task.cancel()

    run(test)


def test_recording_never_waits_for_a_server_that_hangs():
    async def test():
        clock, outcomes, writer = Clock(), [], Taking()
        writer.hold.clear()
        recorder = Recorder("node1", told=outcomes.append, clock=clock)
        task = await running(recorder, writer)
        for port in range(1, 200):
            clock.now += events.EVERY
            recorder.record(events.health_check_not_started("node1", SVC, port, "taken"))
        assert outcomes == ["dropped"] * (199 - events.WAITING)
        await recorder.settled(0.01)
        assert writer.written == []
        task.cancel()

    run(test)


def test_what_is_remembered_has_a_bound():
    clock = Clock()
    recorder = Recorder("node1", clock=clock)
    recorder._queue = asyncio.Queue()
    for port in range(2 * events.REMEMBERED):
        clock.now += events.EVERY
        recorder.record(events.health_check_not_started("node1", SVC, port, "taken"))
    assert len(recorder._recorded) == events.REMEMBERED


def test_what_the_server_refuses_is_dropped_and_told_once(capsys):
    async def test():
        outcomes, writer = [], Taking("events is forbidden (403)")
        recorder = Recorder("node1", told=outcomes.append)
        task = await running(recorder, writer)
        for port in range(3):
            recorder.record(events.health_check_not_started("node1", SVC, port, "taken"))
        await recorder.settled(DEADLINE)
        assert outcomes == ["dropped"] * 3
        assert len(writer.written) == 3
        task.cancel()

    run(test)
    assert capsys.readouterr().out.count("events are not recorded") == 1


# --- through the API server ------------------------------------------------------------------------------------


def test_cfg_56_an_event_reaches_the_api_server():
    async def test():
        async with FakeApiServer() as server, following(server.url) as api:
            answers = []
            api.source.watch_answers(lambda *answer: answers.append(answer))
            await eventually(lambda: api.source._client._session is not None)
            outcomes = []
            recorder = Recorder("node1", told=outcomes.append)
            task = await running(recorder, api.source)
            recorder.record(events.starting("node1"))
            recorder.record(events.health_check_not_started("node1", Key("kube-system", "lb"), 1, "taken"))
            await recorder.settled(DEADLINE)
            assert outcomes == ["recorded"] * 2
            stored = {each["reason"]: each for each in server.store.objects("events")}
            assert stored["Starting"]["regarding"]["name"] == "node1"
            assert stored["Starting"]["apiVersion"] == "events.k8s.io/v1"
            assert stored["FailedToStartServiceHealthcheck"]["metadata"]["namespace"] == "kube-system"
            assert [(method, status) for method, status, _ in answers if method == "POST"] == [("POST", 201)] * 2
            # MET-31: a watch lasts as long as it lasts.
            assert {(method, seconds is None) for method, _, seconds in answers} == {("POST", False), ("GET", True)}
            task.cancel()

    run(test)


@pytest.mark.parametrize(
    ("fault", "why"),
    [(Fault(status=500, verb="create"), "injected fault 500"), (Fault(close=True, verb="create"), "closed")],
)
def test_an_event_that_the_server_does_not_take_is_dropped(fault, why):
    async def test():
        async with FakeApiServer() as server, following(server.url) as api:
            await eventually(lambda: api.source._client._session is not None)
            server.faults.append(fault)
            assert why in await api.source.create("/apis/events.k8s.io/v1/namespaces/default/events", b"{}")

    run(test)


def test_an_event_is_dropped_while_the_server_is_away():
    async def test():
        async with FakeApiServer() as server, following(server.url) as api:
            await eventually(lambda: api.source._client._session is not None)
            await server.stop()
            trouble = await api.source.create("/apis/events.k8s.io/v1/namespaces/default/events", b"{}")
            assert "cannot connect" in trouble

    run(test)


def test_events_are_written_to_api_servers_alone(tmp_path):
    async def test():
        async with FakeApiServer() as server, following(server.url) as api:
            assert isinstance(api.source, Writer)
            assert not isinstance(ManifestSource(str(tmp_path), "node1"), Writer)

    run(test)
