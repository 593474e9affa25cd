"""What is known and what changed (SVC-14, EPS-4, EPS-13, SYN-1, DESIGN 4.1 and 4.4)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.objects import HEADLESS_LABEL, SERVICE_NAME_LABEL, EndpointSlice, Key, Service, ServiceCIDR, convert
from proxy.sources.base import Resource, Sink
from proxy.state import SECOND_LOOK, Changes, State, Trigger, suspicious
from rules.forwarding import Family
from tests.builders import NODE, endpoint, endpoint_slice, node, service

SERVICES, SLICES, NODES, CIDRS = Resource.SERVICES, Resource.SLICES, Resource.NODES, Resource.SERVICE_CIDRS
SVC = Key("ns", "svc")
SLICE = Key("ns", "svc-1")


def fresh(services: Iterable[Service] = (), slices: Iterable[EndpointSlice] = ()) -> State:
    """A state that knows this and has told it."""
    state = State(NODE, started=1000.0)
    state.replace(SERVICES, services)
    state.replace(SLICES, slices)
    state.take_changes()
    return state


def test_a_state_is_a_sink() -> None:
    sink: Sink = State(NODE)
    assert sink is not None


def test_syn1_synced_when_services_and_slices_have_been_listed() -> None:
    state = State(NODE)
    state.set(SERVICES, service())
    state.replace(NODES, [])
    state.replace(SERVICES, [])
    assert not state.synced
    state.replace(SLICES, [])
    assert state.synced


def test_the_first_list_of_a_resource_calls_even_when_it_is_empty() -> None:
    state = State(NODE)
    calls = []
    state.on_change = lambda: calls.append((state.synced, state.listed(NODES)))
    for resource in (SERVICES, SLICES, SLICES, NODES, NODES):
        state.replace(resource, [])
    assert calls == [(False, False), (True, False), (True, True)]


def test_a_service_that_is_new_other_or_gone_is_a_change_and_the_same_is_none() -> None:
    state = fresh()
    calls: list[Changes] = []
    state.on_change = lambda: calls.append(state.take_changes())
    state.set(SERVICES, service())
    state.set(SERVICES, service())
    state.set(SERVICES, service(type="NodePort"))
    state.delete(SERVICES, SVC)
    state.delete(SERVICES, SVC)
    assert calls == [Changes(services=frozenset({SVC}))] * 3
    assert state.services == {}


def test_svc14_what_is_changed_and_changed_back_is_no_change() -> None:
    state = fresh([service()], [endpoint_slice()])
    state.set(SERVICES, service(type="NodePort"))
    state.set(SLICES, endpoint_slice([endpoint("10.0.0.1")]))
    assert state.statistics().service_changes_pending == 1
    state.set(SERVICES, service())
    state.delete(SLICES, SLICE)
    state.set(SLICES, endpoint_slice())
    assert state.statistics().service_changes_pending == state.statistics().endpoint_changes_pending == 0
    assert not state.take_changes()


def test_eps2_a_slice_marks_its_service_even_before_that_is_known() -> None:
    state = fresh()
    one = endpoint_slice([endpoint("10.0.0.1")])
    state.set(SLICES, one)
    assert state.take_changes().services == {SVC}
    assert list(state.slices_of(SVC)) == [one]
    state.delete(SLICES, SLICE)
    assert state.take_changes().services == {SVC}
    assert list(state.slices_of(SVC)) == []


def test_a_slice_that_moves_marks_both_services() -> None:
    state = fresh(slices=[endpoint_slice(owner="svc")])
    moved = endpoint_slice(owner="other")
    state.set(SLICES, moved)
    assert state.take_changes().services == {SVC, Key("ns", "other")}
    assert list(state.slices_of(SVC)) == []
    assert list(state.slices_of(Key("ns", "other"))) == [moved]


def test_a_slice_that_moves_twice_between_syncs_marks_where_it_was_and_where_it_is() -> None:
    state = fresh(slices=[endpoint_slice(owner="svc")])
    state.set(SLICES, endpoint_slice(owner="between"))
    state.set(SLICES, endpoint_slice(owner="other"))
    assert state.take_changes().services == {SVC, Key("ns", "other")}


def test_eps2_a_slice_without_an_owner_is_ignored_and_told() -> None:
    state = fresh(slices=[endpoint_slice()])
    orphan = endpoint_slice(labels={SERVICE_NAME_LABEL: ""})
    state.set(SLICES, orphan)
    assert state.take_changes().services == {SVC}
    assert list(state.troubles) == [("state", "EndpointSlice ns/svc-1")]
    state.set(SLICES, endpoint_slice())
    assert state.troubles == {}
    state.set(SLICES, orphan)
    state.delete(SLICES, SLICE)
    assert state.troubles == {}


def test_eps1_slices_of_headless_services_are_not_kept() -> None:
    state = fresh(slices=[endpoint_slice()])
    state.set(SLICES, endpoint_slice(labels={HEADLESS_LABEL: ""}))
    assert list(state.slices_of(SVC)) == []
    assert state.troubles == {}


def test_a_list_is_all_there_is() -> None:
    state = fresh([service("a"), service("b")], [endpoint_slice(name="a-1", owner="a")])
    state.replace(SERVICES, [service("b"), service("c")])
    state.replace(SLICES, [])
    assert state.take_changes().services == {Key("ns", "a"), Key("ns", "c")}
    assert set(state.services) == {Key("ns", "b"), Key("ns", "c")}


def test_nod8_only_the_own_node_counts_and_its_last_version_stays() -> None:
    state = fresh()
    own = node(labels={"a": "b"})
    state.replace(NODES, [node("other"), own])
    assert state.take_changes() == Changes(node=True)
    state.set(NODES, node(labels={"a": "b"}))
    state.set(NODES, node("other"))
    state.delete(NODES, Key("", NODE))
    state.replace(NODES, [])
    assert not state.take_changes()
    assert state.node == own


def test_cfg_64_each_report_after_the_first_list_is_told_and_whether_it_changes_anything() -> None:
    state, told = State(NODE, started=1000.0), []
    state.on_event = lambda *event: told.append(event)
    state.prepare(SERVICES, [service("a")])
    state.replace(SERVICES, [service("a"), service("b")])
    assert told == []
    state.set(SERVICES, service("a"))
    state.set(SLICES, endpoint_slice(name="a-1"))
    state.delete(SERVICES, Key("ns", "a"))
    state.replace(SERVICES, [service("c")])
    assert told == [
        ("set", SERVICES, Key("ns", "a"), False),
        ("set", SLICES, Key("ns", "a-1"), True),
        ("deleted", SERVICES, Key("ns", "a"), True),
        ("listed", SERVICES, Key("ns", "c"), True),
        ("not listed", SERVICES, Key("ns", "b"), True),
    ]


def test_nod7_a_node_that_is_registered_again_keeps_its_addresses_until_it_has_others() -> None:
    """As in kube-proxy, which reads them once.  Without any, `primary` would be every address of the node (CFG-31)."""
    state, told = fresh(), []
    state.on_trouble = lambda _origin, subject, reason: told.append((subject, reason))
    known = node(addresses={"InternalIP": ["10.0.0.1"]})
    state.replace(NODES, [known])
    state.take_changes()
    state.delete(NODES, Key("", NODE))
    state.set(NODES, node())
    assert not state.take_changes()
    state.set(NODES, node(labels={"a": "b"}))
    assert state.take_changes() == Changes(node=True)
    assert state.node == node(labels={"a": "b"}, addresses={"InternalIP": ["10.0.0.1"]})
    assert told == [(f"Node {NODE}", "it has no addresses now: those that it had hold")]
    state.set(NODES, node(addresses={"InternalIP": ["10.0.0.2"]}))
    assert state.node == node(addresses={"InternalIP": ["10.0.0.2"]})
    assert told[1:] == [(f"Node {NODE}", None)]


def test_service_cidrs_are_kept_and_their_change_is_told() -> None:
    state = fresh()
    cidr = convert(ServiceCIDR, {"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.0.0.0/16"]}})
    state.replace(CIDRS, [cidr])
    assert state.take_changes() == Changes(service_cidrs=True)
    state.replace(CIDRS, [cidr])
    assert not state.take_changes()
    state.delete(CIDRS, Key("", "kubernetes"))
    assert state.take_changes() == Changes(service_cidrs=True)


def stamped(time: str, name: str = "svc-1", **fields: Any) -> EndpointSlice:
    return endpoint_slice(name=name, annotations={"endpoints.kubernetes.io/last-change-trigger-time": time}, **fields)


def test_eps13_trigger_times_later_than_the_start_are_told_once() -> None:
    state = fresh()
    state.set(SLICES, stamped("1970-01-01T00:16:40Z"))
    state.set(SLICES, stamped("1970-01-01T00:16:41.123456789Z"))
    state.set(SLICES, stamped("1970-01-01T00:16:41.123456789Z"))
    state.set(SLICES, stamped("1970-01-01T01:16:42+01:00", "svc-6", address_type="IPv6"))
    state.set(SLICES, stamped("yesterday", "svc-7"))
    state.set(SLICES, stamped("1970-01-01T00:16:49", "svc-8"))
    state.set(SLICES, endpoint_slice(name="svc-9"))
    assert state.take_changes().triggers == (
        Trigger(SVC, Family.IPV4, 1001.123456),
        Trigger(SVC, Family.IPV6, 1002.0),
    )
    assert state.take_changes().triggers == ()


def test_eps13_a_removed_slice_takes_the_times_of_its_service_with_it() -> None:
    state = fresh()
    state.set(SLICES, stamped("2024-01-01T00:00:00Z", "svc-1"))
    state.set(SLICES, stamped("2024-01-01T00:00:00Z", "svc-2"))
    state.set(SLICES, stamped("2024-01-01T00:00:00Z", "other-1", owner="other"))
    state.delete(SLICES, SLICE)
    assert [trigger.service.name for trigger in state.take_changes().triggers] == ["other"]


def test_met_6_to_9_counters() -> None:
    """MET-30: of a node with both families every change counts once, as one state serves both."""
    state = State(NODE)
    state.replace(SERVICES, [service("a"), service("b")])
    state.set(SERVICES, service("a"))
    state.set(SLICES, endpoint_slice())
    state.set(SLICES, endpoint_slice(name="fqdn", address_type="FQDN"))
    state.set(SLICES, endpoint_slice(name="six", address_type="IPv6"))
    statistics = state.statistics()
    assert (statistics.services, statistics.slices) == (2, 3)
    assert (statistics.service_changes_total, statistics.service_changes_pending) == (3, 2)
    assert (statistics.endpoint_changes_total, statistics.endpoint_changes_pending) == (2, 3)
    state.take_changes()
    assert state.statistics().service_changes_pending == state.statistics().endpoint_changes_pending == 0


def test_a_trouble_is_told_when_it_is_new_another_or_over() -> None:
    state = State(NODE)
    told: list[tuple[str, str, str | None]] = []
    state.on_trouble = lambda *trouble: told.append(trouble)
    for reason in ("bad", "bad", "worse", None, None):
        state.trouble("manifests", "a.yaml", reason)
    assert told == [("manifests", "a.yaml", reason) for reason in ("bad", "worse", None)]
    state.trouble("manifests", "a.yaml", "bad")
    state.trouble("compute", "a.yaml", None)
    assert state.troubles == {("manifests", "a.yaml"): "bad"}


# --- lists from which very much has vanished ---


@pytest.mark.parametrize(
    ("known", "vanished", "doubtful"),
    [(0, 0, False), (99, 99, False), (100, 100, True), (199, 100, True), (200, 100, False), (10_000, 5001, True)],
)
def test_a_hundred_and_more_than_half_is_suspicious(known: int, vanished: int, doubtful: bool) -> None:
    assert suspicious(known, vanished) is doubtful


def many(count: int) -> list[Service]:
    return [service(f"s{index}") for index in range(count)]


def names(services: Iterable[Service]) -> list[Key]:
    return [each.key for each in services]


def test_a_list_in_doubt_is_held_until_a_later_one_says_the_same() -> None:
    state = fresh(many(150))
    few = names(many(10))
    assert not state.plausible(SERVICES, few, 100.0)
    assert not state.plausible(SERVICES, few, 100.0 + SECOND_LOOK - 0.1)
    assert state.plausible(SERVICES, few, 100.0 + SECOND_LOOK)


def test_a_list_that_says_otherwise_ends_the_doubt() -> None:
    state = fresh(many(150))
    assert not state.plausible(SERVICES, [], 100.0)
    assert state.plausible(SERVICES, names(many(149)), 101.0)
    assert not state.plausible(SERVICES, [], 110.0)


def test_two_lists_that_lack_different_objects_do_not_confirm_each_other() -> None:
    state = fresh(many(300))
    every = names(many(300))
    assert not state.plausible(SERVICES, every[:140], 100.0)
    assert not state.plausible(SERVICES, every[160:], 110.0)
    assert not state.plausible(SERVICES, every[160:], 111.0)


def test_each_resource_is_doubted_for_itself_and_few_objects_never() -> None:
    state = fresh(many(150), [endpoint_slice(name=f"x{index}") for index in range(99)])
    assert not state.plausible(SERVICES, [], 100.0)
    assert state.plausible(SLICES, [], 100.0)
    assert state.plausible(NODES, [], 100.0)
    assert state.plausible(CIDRS, [], 100.0)


def test_what_is_not_known_yet_cannot_vanish() -> None:
    assert State(NODE).plausible(SERVICES, [], 0.0)


def test_single_deletions_are_never_held() -> None:
    state = fresh(many(150))
    for each in many(150):
        state.delete(SERVICES, each.key)
    assert state.services == {}


# --- any sequence of reports ---

_OWNERS = ["a", "b"]
_REPORTS = st.lists(
    st.one_of(
        st.tuples(st.just("slice"), st.sampled_from(["x", "y"]), st.sampled_from(_OWNERS), st.integers(1, 2)),
        st.tuples(st.just("gone"), st.sampled_from(["x", "y"]), st.just(""), st.just(0)),
        st.tuples(st.just("service"), st.sampled_from(_OWNERS), st.just(""), st.integers(80, 81)),
        st.tuples(st.just("no service"), st.sampled_from(_OWNERS), st.just(""), st.just(0)),
        st.tuples(st.just("take"), st.just(""), st.just(""), st.just(0)),
    ),
    max_size=25,
)


@given(_REPORTS)
def test_changes_name_exactly_the_services_that_differ_from_the_last_time(
    reports: list[tuple[str, str, str, int]],
) -> None:
    state = fresh()
    picture: dict[str, object] = {}

    def seen() -> dict[str, object]:
        return {
            owner: (
                state.services.get(Key("ns", owner)),
                sorted(state.slices_of(Key("ns", owner)), key=lambda each: each.metadata.name),
            )
            for owner in _OWNERS
        }

    picture = seen()
    for verb, name, owner, number in [*reports, ("take", "", "", 0)]:
        match verb:
            case "slice":
                state.set(SLICES, endpoint_slice([endpoint(f"10.0.0.{number}")], name=name, owner=owner))
            case "gone":
                state.delete(SLICES, Key("ns", name))
            case "service":
                state.set(SERVICES, service(name, ports=[{"port": number}]))
            case "no service":
                state.delete(SERVICES, Key("ns", name))
            case "take":
                now = seen()
                differ = {Key("ns", each) for each in _OWNERS if now[each] != picture[each]}
                assert state.take_changes().services == differ
                picture = now


def test_when_others_vanish_than_before_the_doubt_begins_anew_and_ends() -> None:
    state = State(NODE)
    every = names(many(300))
    state.replace(SERVICES, many(300))
    assert not state.plausible(SERVICES, every[:100], 100.0)
    assert not state.plausible(SERVICES, every[200:], 110.0)
    assert state.plausible(SERVICES, every[200:], 110.0 + SECOND_LOOK)


def test_a_first_list_that_was_prepared_is_told_once_and_not_known_before() -> None:
    state = State("node1")
    told: list[bool] = []
    state.on_change = lambda: told.append(state.listed(Resource.SERVICES))
    web, dns = service("web"), service("dns")
    state.prepare(Resource.SERVICES, [web])
    assert not told
    assert not state.listed(Resource.SERVICES)
    state.replace(Resource.SERVICES, [web, dns])
    assert told == [True]
    assert state.take_changes().services == {web.key, dns.key}
    assert state.statistics().service_changes_total == 2
    state.prepare(Resource.SERVICES, [service("late")])
    assert service("late").key not in state.services, "only a first list can be prepared"
