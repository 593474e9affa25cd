"""Objects from the bytes of manifests, one by one, and what several files say together."""

import contextlib

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.objects import Key
from proxy.sources.manifest_loading import loads
from proxy.sources.manifest_objects import Content, FileError, keep_last_valid, merge, parse
from proxy.sources.yaml_children import Converter


def content(text, name="web.yaml"):
    data = text if isinstance(text, bytes) else text.encode()
    return parse(name, data, Converter().convert)


def service(name="web", *, ip="10.96.0.1", port=80, **metadata):
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, **metadata},
        "spec": {"clusterIP": ip, "ports": [{"port": port}]},
    }


def endpoint_slice(name="web-1", *, owner="web", labels=None):
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": owner, **(labels or {})}},
        "addressType": "IPv4",
        "ports": [{"port": 8080}],
        "endpoints": [{"addresses": ["10.244.1.11"]}],
    }


def endpoints(name="web"):
    return {
        "apiVersion": "v1",
        "kind": "Endpoints",
        "metadata": {"name": name},
        "subsets": [{"addresses": [{"ip": "11.11.11.11"}], "ports": [{"port": 80}]}],
    }


def json(*objects, kind="List"):
    return msgspec.json.encode({"apiVersion": "v1", "kind": kind, "items": list(objects)})


def names(content):
    return sorted(identity.key.name for identity in content.objects)


def problems(content):
    return [str(problem) for problem in content.problems]


# --- forms of files ---


def test_yaml_documents_lists_and_json_say_the_same():
    a, b = service("a"), service("b")
    documents = b"---\n".join(msgspec.json.encode(each) + b"\n" for each in (a, b))
    forms = [
        content(documents),
        content(b"\xef\xbb\xbf" + documents),
        content(json(a, b)),
        content(json(a, b), "web.json"),
        content(msgspec.json.encode(a) + b"\n" + msgspec.json.encode(b), "web.json"),
        content(json(json_raw(a, b)), "nested.json"),
        content(typed_list(a, b), "typed.json"),
    ]
    assert names(forms[0]) == ["a", "b"]
    for form in forms:
        assert form.objects == forms[0].objects
        assert not form.problems


def json_raw(*objects):
    return {"apiVersion": "v1", "kind": "List", "items": list(objects)}


def typed_list(*objects):
    """What an API server answers: the items don't say their kind."""
    bare = [{key: value for key, value in each.items() if key not in {"kind", "apiVersion"}} for each in objects]
    return json(*bare, kind="ServiceList")


def test_kubectl_prints_a_list_of_several_kinds():
    text = """
apiVersion: v1
items:
- apiVersion: v1
  kind: Service
  metadata: {name: web, namespace: shop, creationTimestamp: 2026-01-01T00:00:00Z}
  spec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}
- apiVersion: discovery.k8s.io/v1
  kind: EndpointSlice
  metadata: {name: web-1, namespace: shop, creationTimestamp: null}
  addressType: IPv4
  endpoints: null
  ports: null
- apiVersion: v1
  kind: Node
  metadata: {name: node1}
- apiVersion: networking.k8s.io/v1
  kind: ServiceCIDR
  metadata: {name: kubernetes}
  spec: {cidrs: [10.96.0.0/16]}
kind: List
metadata:
  resourceVersion: ""
"""
    found = content(text)
    assert not found.problems
    assert [str(identity) for identity in found.objects] == [
        "Service shop/web",
        "EndpointSlice shop/web-1",
        "Node node1",
        "ServiceCIDR kubernetes",
    ]
    assert found.objects[next(iter(found.objects))].metadata.creation_timestamp == "2026-01-01T00:00:00Z"


@pytest.mark.parametrize("data", [b"", b"\n\n", b"---\n", b"# nothing\n", b"null\n", b'{"kind":"List","items":null}'])
def test_files_that_hold_nothing_are_valid(data):
    assert content(data) == Content()


def test_other_kinds_are_passed_over_in_silence():
    other = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": 3, "spec": "whatever"}
    assert content(json(other)) == Content()
    assert content(json({"anything": 1}, kind="PodList")) == Content()


@pytest.mark.parametrize(
    ("data", "name", "reason"),
    [
        (b"kind: 'Serv\n", "a.yaml", "line 2, column 1: "),
        (b'{"a": 1,\n "b": }\n', "a.json", "line 2, column 7: not JSON: invalid character"),
        (b'{"kind":"List","items":[]}\n\n{"kind": "', "a.json", "line 3, column 11: not JSON: it ends too early"),
        (b"kind: Service\nname: \xff\n", "a.yaml", "line 2: not UTF-8"),
        (b"[" * 100_000, "a.json", "nested too deeply"),
    ],
)
def test_a_text_that_is_nothing_is_an_error_with_its_line(data, name, reason):
    with pytest.raises(FileError) as caught:
        content(data, name)
    assert str(caught.value).startswith(reason)
    with pytest.raises(FileError, match=f"^{name}: "):
        loads(name, data)


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode(errors="surrogatepass")))
def test_arbitrary_bytes_are_read_or_refused(data):
    for name in ("a.yaml", "a.json"):
        with contextlib.suppress(FileError):
            content(data, name)


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 70000) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["kind", "apiVersion", "items", "metadata", "name", "namespace", "spec", "ports", "port"])
            | st.text(max_size=3),
            inner | st.sampled_from(["Service", "List", "ServiceList", "v1", "web", "EndpointSlice"]),
            max_size=5,
        )
    ),
    max_leaves=20,
)


@given(anything)
def test_arbitrary_values_are_objects_problems_or_nothing(value):
    try:
        data = msgspec.json.encode(value)
    except (ValueError, UnicodeEncodeError):
        return
    found = content(data, "a.json")
    assert merge({"a.json": found}).problems == found.problems


# --- single objects ---


def test_one_wrong_object_among_many_is_one_object_skipped():
    objects = [service(f"web-{number}", ip=f"10.96.{number // 256}.{number % 256}") for number in range(10_000)]
    objects[4711]["spec"]["ports"][0]["port"] = "80"
    found = content(json(*objects))
    assert len(found.objects) == 9_999
    assert problems(found) == ["web.yaml: Service default/web-4711: spec.ports[0].port: expected int, got str"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"metadata": {"name": 123}}, "web.yaml: Service in document 1 item 1: metadata.name: expected str, got int"),
        ({"metadata": {}}, "web.yaml: Service in document 1 item 1: metadata.name: missing"),
        ({"metadata": {"name": "Web\x1b[31m"}}, r"metadata.name: 'Web\x1b[31m' is no DNS name"),
        ({"metadata": {"name": "web", "namespace": "a/b"}}, "metadata.namespace: 'a/b' is no DNS name"),
        ({"spec": []}, "web.yaml: Service default/web: spec: expected"),
        ({"spec": {"ports": [{"name": "http"}]}}, "web.yaml: Service default/web: spec.ports[0]: missing"),
        ({"spec": {"ports": [{"port": 65536}]}}, "web.yaml: Service default/web: spec.ports[0].port: expected"),
    ],
)
def test_a_wrong_object_is_named_with_its_field(change, problem):
    found = content(json({**service(), **change}, service("other")))
    assert names(found) == ["other"]
    assert problem in problems(found)[0]
    assert len(found.problems) == 1


@pytest.mark.parametrize("item", [1, "text", [], {"a": 1}, {"kind": 3}, {"kind": "List", "items": {"a": 1}}])
def test_what_is_no_object_is_reported_with_its_place(item):
    found = content(json(service(), item))
    assert names(found) == ["web"]
    assert problems(found)[0].startswith("web.yaml: document 1 item 2")
    assert found.unknown


def test_another_version_of_our_kinds_is_one_complaint():
    old = [{**endpoint_slice(f"web-{number}"), "apiVersion": "discovery.k8s.io/v1beta1"} for number in range(3)]
    found = content(json(service(), *old))
    assert names(found) == ["web"]
    assert problems(found) == [
        "web.yaml: EndpointSlice of discovery.k8s.io/v1beta1: 3 objects passed over: only discovery.k8s.io/v1 is read"
    ]


def test_namespaces_default_and_do_not_exist_for_nodes():
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node1", "namespace": "odd"}}
    found = content(json(service(), service("b", namespace="shop"), node))
    assert {identity.key for identity in found.objects} == {
        Key("default", "web"),
        Key("shop", "b"),
        Key("", "node1"),
    }


def test_what_an_api_server_would_add_is_added():
    loaded = loads("a.yaml", json(service(ip="fd00::1"), endpoint_slice()))
    (web,), (only,) = loaded.services, loaded.slices
    assert (web.spec.cluster_ips, web.spec.ip_families) == (("fd00::1",), ("IPv6",))
    assert only.ports[0].name == ""

    dual = service()
    dual["spec"] = {"clusterIPs": ["10.96.0.1", "fd00::1"], "ipFamilies": ["IPv4"], "ports": [{"port": 80}]}
    (web,) = loads("a.yaml", json(dual)).services
    assert web.spec.cluster_ip == "10.96.0.1"
    assert web.spec.ip_families == ("IPv4", "IPv6")


def test_what_nobody_allocated_is_reported_and_the_service_kept():
    without = service(ip="")
    port = service("port", ip="10.96.0.2")
    port["spec"]["type"] = "NodePort"
    headless, name = service("headless", ip="None"), service("name", ip="")
    name["spec"]["type"] = "ExternalName"
    found = content(json(without, port, headless, name))
    assert len(found.objects) == 4
    assert [line.split(":")[1:3] for line in problems(found)] == [
        [" Service default/web", " spec.clusterIP"],
        [" Service default/port", " spec.ports[0].nodePort"],
    ]


# --- what was valid last ---


def test_an_object_that_became_wrong_keeps_its_last_valid_version():
    before = content(json(service("a", port=1), service("b", port=2), service("c", port=3)))
    wrong = service("b")
    wrong["spec"]["ports"][0]["port"] = "80"
    after = keep_last_valid(content(json(service("a", port=7), wrong)), before)
    ports = {identity.key.name: value.spec.ports[0].port for identity, value in after.objects.items()}
    assert ports == {"a": 7, "b": 2}
    assert len(after.problems) == 1


def test_what_cannot_be_told_keeps_all_that_was_valid():
    before = content(json(service("a", port=1), service("b", port=2)))
    after = keep_last_valid(content(json(service("a", port=7), {"kind": "Service", "apiVersion": "v1"})), before)
    ports = {identity.key.name: value.spec.ports[0].port for identity, value in after.objects.items()}
    assert ports == {"a": 7, "b": 2}


# --- several files ---


def test_the_first_of_two_in_file_name_order_counts():
    contents = {
        "b.yaml": content(json(service(port=2), service("only-b")), "b.yaml"),
        "a.yaml": content(json(service(port=1), service(port=9)), "a.yaml"),
    }
    loaded = merge(contents)
    assert {each.metadata.name: each.spec.ports[0].port for each in loaded.services} == {"web": 1, "only-b": 80}
    assert [str(problem) for problem in loaded.problems] == [
        "a.yaml: duplicates: Service default/web stands twice: the first one counts",
        "b.yaml: duplicates: Service default/web stands in a.yaml too: the first one counts",
    ]


def test_many_duplicates_are_one_complaint():
    objects = json(*(service(f"web-{number}") for number in range(5)))
    loaded = merge({"a.yaml": content(objects), "b.yaml": content(objects)})
    assert [str(problem) for problem in loaded.problems] == [
        "b.yaml: duplicates: Service default/web-0 and 4 others stand in a.yaml too: the first one counts"
    ]


def test_what_selectors_of_an_api_server_hide_is_hidden():
    other = service("other", labels={"service.kubernetes.io/service-proxy-name": "mine"})
    headless = endpoint_slice("headless-1", labels={"service.kubernetes.io/headless": ""})
    loaded = loads("a.yaml", json(service(), other, endpoint_slice(), headless))
    assert [each.metadata.name for each in loaded.services] == ["web"]
    assert [each.metadata.name for each in loaded.slices] == ["web-1"]


def test_endpoints_are_mirrored_unless_any_file_has_a_slice_of_the_service():
    alone = {"a.yaml": content(json(service(), endpoints()))}
    (mirrored,) = merge(alone).slices
    assert mirrored.endpoints[0].addresses == ("11.11.11.11",)
    with_slice = {**alone, "z.yaml": content(json(endpoint_slice()))}
    assert [each.metadata.name for each in merge(with_slice).slices] == ["web-1"]
    hidden = {**alone, "z.yaml": content(json(endpoint_slice(labels={"service.kubernetes.io/headless": ""})))}
    assert merge(hidden).slices == ()


def test_endpoints_that_are_not_mirrored_whole_are_reported_with_their_file():
    bad = endpoints()
    bad["subsets"][0]["addresses"][0]["ip"] = "one"
    loaded = loads("a.yaml", json(bad))
    assert [str(problem) for problem in loaded.problems] == [
        "a.yaml: Endpoints default/web: subsets: 'one' is no IP address"
    ]


def test_all_nodes_are_kept_for_replay_and_one_for_an_agent():
    nodes = [{"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}} for name in ("node2", "node1")]
    assert [node.metadata.name for node in loads("a", json(*nodes)).nodes] == ["node1", "node2"]
    assert [node.metadata.name for node in loads("a", json(*nodes), "node2").nodes] == ["node2"]


@settings(max_examples=30)
@given(st.permutations(["a.yaml", "b.yaml", "c.json"]))
def test_the_order_in_which_files_are_found_does_not_matter(order):
    texts = {
        "a.yaml": json(service("a"), service("x", port=1)),
        "b.yaml": json(service("x", port=2)),
        "c.json": json(endpoints("x")),
    }
    expected = merge({name: content(text, name) for name, text in texts.items()})
    assert merge({name: content(texts[name], name) for name in order}) == expected
