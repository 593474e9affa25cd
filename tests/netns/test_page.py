"""The page /debug/services in a headless Chromium, beside a running agent: `make test-page` installs what it needs."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench.browser import KEYS, Browser, missing
from tests.netns import test_counters as counters
from tests.netns.isolation import own_network_namespace
from tests.netns.test_verify import Agent

pytestmark = pytest.mark.netns

PAGE = "http://127.0.0.1:10249/debug/services"
HOSTILE = "<img src=x onerror=window.pwned=1>"
SHOTS = os.environ.get("SLUICE_SCREENSHOTS", "")
"""A directory, for somebody who wants to look."""


def objects(pods: int = 2) -> list[dict[str, Any]]:
    def service(name: str, ip: str, **spec: Any) -> dict[str, Any]:
        return {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name, "namespace": "shop"},
            "spec": {"clusterIP": ip, "ports": [{"name": "http", "port": 80}], **spec},
        }

    web = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "web-1", "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080}],
        "endpoints": [{"addresses": [f"10.244.1.{number + 5}"], "nodeName": HOSTILE} for number in range(pods)],
    }
    hostile = service("hostile", "10.96.0.3", selector={"app": HOSTILE})
    hostile["metadata"]["annotations"] = {"sluice.internal/scheduler": HOSTILE}
    return [
        service("web", "10.96.0.1", type="NodePort", ports=[{"name": "http", "port": 80, "nodePort": 30080}]),
        web,
        service("empty", "10.96.0.2", selector={"app": "empty"}),
        hostile,
        *(service(f"many-{number:03}", f"10.96.1.{number}") for number in range(1, 200)),
    ]


def write(path: Path, items: list[dict[str, Any]]) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(msgspec.json.encode({"apiVersion": "v1", "kind": "List", "items": items}))
    new.rename(path)


class Looked:
    """A browser at the page, and the agent behind it."""

    def __init__(self, browser: Browser, agent: Agent, manifests: Path) -> None:
        self.browser = browser
        self.agent = agent
        self.manifests = manifests

    def rows(self) -> list[str]:
        """The Services that can be seen, from above."""
        script = """
            return [...document.querySelectorAll('#viewport .row')].filter((row) => !row.hidden)
                .sort((a, b) => a.getAttribute('aria-posinset') - b.getAttribute('aria-posinset'))
                .map((row) => row.children[1].innerText)
        """
        found: list[str] = self.browser.run(script)
        return found

    def shows(self, selector: str, words: str) -> None:
        """Wait until words can be read somewhere."""
        script = "return (document.querySelector(arguments[0])?.innerText ?? '').includes(arguments[1])"
        self.browser.until(script, selector, words)

    def selected(self) -> str:
        return self.browser.text('#viewport .row[aria-selected="true"] span:nth-child(2)')


@pytest.fixture
def page(root: None, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Looked]:
    if lacking := missing():
        pytest.skip(f"{lacking} not installed: make test-page")
    manifests = tmp_path / "objects" / "all.json"
    manifests.parent.mkdir()
    write(manifests, objects())
    with own_network_namespace(), contextlib.ExitStack() as stack:
        for command in (
            "sysctl -q -w net.ipv4.ip_forward=1",
            "ip link add pods type veth peer name pods-end",
            "ip link set pods up",
            "ip link set pods-end up",
            "ip route add 10.244.0.0/16 dev pods",
        ):
            subprocess.run(command.split(), check=True)
        more = ["--debug-page", "--iptables-min-sync-period=1ms", "--service-cidrs=10.96.0.0/16"]
        agent = Agent(tmp_path, "report", manifests, more)
        stack.callback(agent.stop)
        browser = stack.enter_context(Browser())
        browser.open(PAGE)
        browser.until("return performance.getEntriesByName('rows').length > 0")
        yield Looked(browser, agent, manifests)
        if SHOTS:
            browser.screenshot(Path(SHOTS) / f"{request.node.name}.png")
        # Neither an error of the script's nor a violation of the policy, whatever was done.
        said = [each for each in browser.complaints() if "Failed to load resource" not in each]
        assert said == []
        assert browser.run("return window.pwned ?? null") is None


def test_services_are_found_by_keys_alone(page: Looked) -> None:
    browser = page.browser
    assert "Failing 201" in browser.text("#filters").replace("\n", " ")
    assert len(page.rows()) < 60, "rows that cannot be seen are not in the document"
    browser.type("/10.244.1.6")
    page.shows("#count", "1 of 202")
    assert page.rows() == ["shop/web"]
    browser.type(KEYS["down"])
    page.shows("#panel-service h1", "shop/web")
    page.shows("#panel-service", "10.244.1.6:8080")
    page.shows("#panel-service", "*:30080/TCP")
    browser.type(KEYS["escape"])
    page.browser.until("return document.getElementById('count').innerText === ''")
    browser.type(KEYS["escape"] + KEYS["end"])
    browser.until("return document.querySelector('#viewport').scrollTop > 1000")
    assert page.selected() == page.rows()[-1]
    browser.type("k")
    assert page.selected() == page.rows()[-2]
    browser.type("/many -many-1" + KEYS["enter"] + "jjj")
    page.shows("#panel-service h1", "shop/many-004")
    # What was looked at stands in the address, for somebody else to follow.
    browser.until("return location.hash.includes('many-004')")
    browser.open("about:blank")
    browser.open(f"{PAGE}/#q=many&s=shop%2Fmany-007")
    page.shows("#panel-service h1", "shop/many-007")
    page.shows("#count", "199 of 202")


def test_what_changes_in_the_cluster_changes_on_the_page(page: Looked) -> None:
    browser = page.browser
    page.shows("#live", "live")
    browser.type("/shop/web" + KEYS["enter"])
    page.shows("#viewport", "2 / 2")
    page.shows("#panel-service", "2 backends")
    write(page.manifests, objects(pods=3))
    page.shows("#viewport", "3 / 3")
    page.shows("#panel-service", "3 backends")
    write(page.manifests, [each for each in objects() if not each["metadata"]["name"].startswith("web")])
    page.shows("#empty", "No Service is like that.")
    page.shows("#panel-service", "there is no Service shop/web")


def test_a_node_without_services_says_that_there_are_none(page: Looked) -> None:
    """More than half of many Services at once: they are read again before that is believed."""
    write(page.manifests, [])
    page.shows("#empty", "There is no Service. One that comes is shown at once.")
    write(page.manifests, objects()[:2])
    page.shows("#viewport", "shop/web")


def test_a_connection_is_explained(page: Looked) -> None:
    browser = page.browser
    browser.type("/shop/web" + KEYS["enter"])
    page.shows("#panel-service h1", "shop/web")
    browser.type("e" + KEYS["enter"])
    page.shows("#answer", "It works.")
    page.shows("#answer", "sluice explain shop/web")
    page.shows("#answer", "10.244.1.5:8080")
    page.shows("#answer", "TRF-12")
    for question, words in (
        ("10.96.0.2:80", "It does not work."),
        ("no sense", "is neither ADDRESS:PORT"),
        ("svc/web", "there is shop/web"),
        (HOSTILE, HOSTILE),
        ("10.96.0.1:81", "rejected"),
    ):
        browser.run("document.getElementById('target').value = ''; document.getElementById('target').focus()")
        browser.type(question + KEYS["enter"])
        page.shows("#answer", words)


def test_hostile_words_are_words(page: Looked) -> None:
    browser = page.browser
    browser.type("/hostile" + KEYS["enter"] + KEYS["down"])
    page.shows("#panel-service", f"app={HOSTILE}")
    page.shows("#panel-service", f"sluice.internal/scheduler={HOSTILE}")
    browser.type("n")
    page.shows("#panel-node", HOSTILE)
    browser.type(KEYS["escape"] + "/")
    browser.run("document.getElementById('search').select()")
    browser.type("shop/web" + KEYS["enter"])
    page.shows("#panel-service", HOSTILE)
    assert browser.run("return document.querySelectorAll('main img').length") == 0


def test_filters_the_other_panes_and_the_keys(page: Looked) -> None:
    browser = page.browser
    browser.type("f")
    page.shows("#count", "201 of 202")
    browser.type("f")
    assert page.rows() == ["shop/web"]
    browser.type("n")
    page.shows("#panel-node", "The kernel holds what is wanted.")
    page.shows("#panel-node", "trafficCounters: true")
    browser.type(KEYS["escape"] + "?")
    browser.until("return document.getElementById('help').open")
    browser.type(KEYS["escape"])
    browser.until("return !document.getElementById('help').open")
    # Every control has a name, and Tab leads to them.
    nameless = """
        const all = [...document.querySelectorAll("button, input")];
        return all.filter((each) => each.offsetParent
            && !each.innerText.trim() && !each.ariaLabel && !each.closest('label')).map((each) => each.id)
    """
    assert browser.run(nameless) == []
    browser.run("document.activeElement.blur()")
    reached = set()
    for _ in range(30):
        browser.type(KEYS["tab"])
        reached.add(browser.run("return document.activeElement.id || document.activeElement.parentElement.id"))
    assert {"search", "filters", "columns", "viewport", "theme", "keys"} <= reached


def test_light_and_dark(page: Looked) -> None:
    ground = "return getComputedStyle(document.body).backgroundColor"
    before = page.browser.run(ground)
    page.browser.click("#theme")
    after = page.browser.run(ground)
    assert before != after
    page.browser.open(PAGE)
    assert page.browser.run(ground) == after, "it is kept"


def test_traffic_is_shown_as_it_passes(root: None, tmp_path: Path) -> None:
    if lacking := missing():
        pytest.skip(f"{lacking} not installed: make test-page")
    with own_network_namespace(), contextlib.ExitStack() as stack:
        counters.node_with_pods()
        more = ["--debug-page", "--traffic-counters"]
        agent = Agent(tmp_path, "report", counters.manifests(tmp_path), more)
        stack.callback(agent.stop)
        server = counters.Server(20_000)
        stack.callback(server.close)
        browser = stack.enter_context(Browser())
        page = Looked(browser, agent, tmp_path)
        browser.open(PAGE)
        browser.until("return performance.getEntriesByName('rows').length > 0")
        browser.type("/default/web" + KEYS["enter"])
        page.shows("#panel-service h1", "default/web")
        held = [stack.enter_context(counters.connect()) for _ in range(3)]
        browser.until("return document.querySelector('#viewport .row .number:nth-child(5)')?.innerText === '3'")
        page.shows("#panel-service", "10.244.1.5:8080")
        page.shows("#panel-service .tiles", "3")
        assert browser.complaints() == []
        assert len(held) == 3


def test_the_agent_may_go_and_come(page: Looked, tmp_path: Path) -> None:
    page.shows("#live", "live")
    page.agent.stop()
    page.browser.until("return document.getElementById('live').dataset.state === 'gone'", seconds=40)
    write(page.manifests, objects(pods=3))
    more = ["--debug-page", "--iptables-min-sync-period=1ms"]
    agent = Agent(tmp_path, "report", page.manifests, more)
    try:
        page.shows("#live", "live")
        page.browser.type("/shop/web")
        page.shows("#viewport", "3 / 3")
    finally:
        page.browser.open("about:blank")
        page.browser.complaints()  # of an agent that did not answer
        agent.stop()
