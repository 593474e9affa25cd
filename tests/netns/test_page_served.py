"""Where the page /debug/services is served, and to whom, by a running agent."""

from __future__ import annotations

import http.client
import json
from pathlib import Path

import pytest

from tests.netns.isolation import own_network_namespace
from tests.netns.test_verify import Agent

pytestmark = pytest.mark.netns

PATHS = ("/debug/services/", "/debug/services/data", "/debug/services/static/services.js")


def ask(path: str, *, method: str = "GET", **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", 10249, timeout=20)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("flags", "status", "complaint"),
    [
        ([], 404, ""),
        (["--debug-page"], 200, ""),
        (["--debug-page", "--metrics-bind-address=0.0.0.0:10249"], 404, "others than this node can reach"),
        (["--debug-page", "--metrics-bind-address=0.0.0.0:10249", "--debug-page-anywhere"], 200, ""),
    ],
)
def test_it_is_served_where_it_was_asked_for(
    flags: list[str], status: int, complaint: str, root: None, tmp_path: Path
) -> None:
    with own_network_namespace():
        agent = Agent(tmp_path, "report", None, flags)
        try:
            agent.until(lambda: ask("/metrics")[0] == 200)
            assert [ask(path)[0] for path in PATHS] == [status] * len(PATHS)
            assert (
                (complaint in agent.log.read_text()) if complaint else ("/debug/services" not in agent.log.read_text())
            )
        finally:
            agent.stop()


def test_whom_it_answers(root: None, tmp_path: Path) -> None:
    with own_network_namespace():
        agent = Agent(tmp_path, "report", None, ["--debug-page"])
        try:
            agent.until(lambda: ask("/metrics")[0] == 200)
            status, body = ask("/debug/services/data")
            assert (status, [each["s"] for each in json.loads(body)["services"]]) == (200, ["default/web"])
            assert ask("/debug/services/data", Host="evil.example:10249")[0] == 403
            assert ask("/debug/services/data", Sec_Fetch_Site="cross-site", Sec_Fetch_Dest="empty")[0] == 403
            assert ask("/debug/services/data", method="POST")[0] == 405
            assert ask("/debug/services/", method="HEAD") == (200, b"")
            status, body = ask("/debug/services/explain?target=default/web&from=pod")
            assert status == 200
            assert json.loads(body)["answers"][0]["service"].startswith("default/web")
            # Other pages of that server answer whoever asks, as kube-proxy's do.
            assert ask("/metrics", Host="evil.example")[0] == 200
            assert b"/debug" in ask("/statusz")[1]
        finally:
            agent.stop()
