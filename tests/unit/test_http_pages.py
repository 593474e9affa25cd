"""/statusz, /flagz and the profiles: HTTP-1."""

from __future__ import annotations

import asyncio
import json
import platform
import sys
import threading
import time
from pathlib import Path

import pytest

from proxy.serving import pages, profiles
from proxy.serving.messages import Request
from proxy.serving.profiles import Profiles, Sampler, collapsed, table

STARTED = 1_729_112_623.0  # Wed Oct 16 21:03:43 UTC 2024


def statusz(accept="", **more):
    fields = f"Accept: {accept}\r\n".encode() if accept else b""
    arguments = {"version": "1.2.3", "started": STARTED, "uptime": 3_723.5, "paths": ("/metrics", "/a/b")}
    return pages.statusz(Request("GET", "/statusz", fields=fields), **(arguments | more))


def test_statusz_is_laid_out_as_kubernetes_lays_it_out():
    response = statusz()
    assert response.status == 200
    assert ("Content-Type", "text/plain; charset=utf-8") in response.headers
    head, warning, blank, *lines = response.body.decode().removeprefix("\n").splitlines()
    assert (head, blank) == ("kube-proxy statusz", "")
    assert warning.startswith("Warning: This endpoint is not meant to be machine parseable")
    assert lines == [
        "Started: Wed Oct 16 21:03:43 UTC 2024",
        "Up: 1 hr 02 min 03 sec",
        f"Python version: {platform.python_version()}",
        "Binary version: 1.2.3 (sluice)",
        "Paths: /a /metrics",
    ]


def test_statusz_pads_the_day_as_go_does():
    assert b"Started: Wed Oct  2 " in statusz(started=STARTED - 14 * 86400).body


@pytest.mark.parametrize(("version", "deprecated"), [("v1beta1", False), ("v1alpha1", True)])
def test_statusz_is_json_for_whoever_names_its_version(version, deprecated):
    response = statusz(f"application/json;v={version};g=config.k8s.io;as=Statusz")
    assert json.loads(response.body) == {
        "kind": "Statusz",
        "apiVersion": f"config.k8s.io/{version}",
        "metadata": {"name": "kube-proxy"},
        "startTime": "2024-10-16T21:03:43Z",
        "uptimeSeconds": 3723,
        "binaryVersion": "1.2.3",
        "paths": ["/a", "/metrics"],
    }
    assert ("Content-Type", "application/json") in response.headers
    assert any(name == "Warning" for name, _ in response.headers) is deprecated


@pytest.mark.parametrize(
    ("accept", "status"),
    [
        ("text/plain", 200),
        ("*/*", 200),
        ("application/json;v=foo;g=config.k8s.io;as=Statusz,*/*", 200),
        ("application/json", 406),
        ("application/json;v=v1beta1;g=config.k8s.io", 406),
        ("application/json;v=v1beta1;g=config.k8s.io;as=Flagz", 406),
        ("application/xml", 406),
    ],
)
def test_statusz_has_a_form_for_who_accepts_one(accept, status):
    response = statusz(accept)
    assert response.status == status
    if status == 200:
        assert response.body.startswith(b"\nkube-proxy statusz\n")


def test_flagz_shows_the_flags_of_the_command_line_and_the_defaults_of_the_others():
    arguments = ["run", "--config=/etc/x.conf", "--proxy_mode", "nftables", "--masquerade-all", "--v=2", "-v4"]
    response = pages.flagz(Request("GET", "/flagz"), arguments)
    lines = response.body.decode().splitlines()
    assert lines[1] == "kube-proxy flagz"
    found = dict(line.partition("=")[::2] for line in lines[4:])
    assert list(found) == sorted(found)
    assert found["config"] == "/etc/x.conf"
    assert (found["proxy-mode"], found["masquerade-all"], found["v"]) == ("nftables", "true", "4")
    assert (found["healthz-bind-address"], found["iptables-sync-period"]) == ("0.0.0.0:10256", "30s")
    assert (found["cleanup"], found["nodeport-addresses"], found["ipvs-udp-timeout"]) == ("false", "[]", "0s")
    structured = pages.flagz(
        Request("GET", "/flagz", fields=b"Accept: application/json;v=v1beta1;g=config.k8s.io;as=Flagz\r\n"), arguments
    )
    assert json.loads(structured.body)["flags"] == found


def test_flagz_of_a_command_line_that_makes_no_sense_shows_defaults():
    assert pages.flag_values(["--proxy-mode"])["proxy-mode"] == ""


# --- profiles --------------------------------------------------------------------------------------------------


def answer(target):
    path, _, query = target.partition("?")

    async def ask():
        return await Profiles().answer(Request("GET", profiles.PREFIX + path, query))

    return asyncio.run(ask())


def spin(stop):
    while not stop.is_set():
        sum(range(100))


def test_a_profile_names_who_works_and_not_who_waits():
    stop, interval = threading.Event(), sys.getswitchinterval()
    threads = [
        threading.Thread(target=spin, args=(stop,), name="worker"),
        threading.Thread(target=stop.wait, name="sleeper"),
    ]
    for thread in threads:
        thread.start()
    sampler = Sampler(0.001)
    sampler.start()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and sum(each.total() for each in sampler._samples.values()) < 20:
        stop.wait(0.01)
    sampler.stop()
    taken = sampler.taken()
    stop.set()
    for thread in threads:
        thread.join()
    names = {str(stack[0]) for stack in taken}
    assert "worker" in names
    assert "sleeper" not in names
    assert f"{__name__}:spin" in table(taken)
    lines = collapsed(taken).splitlines()
    worker = next(line for line in lines if line.startswith("worker;threading:Thread._bootstrap;"))
    assert int(worker.rpartition(" ")[2]) > 0
    assert "profile" not in names, "the sampling itself counts for nothing"
    assert sys.getswitchinterval() == interval


@pytest.mark.parametrize("seconds", ["x", "0", "-1", "nan", "1e9"])
def test_a_profile_of_no_time_is_refused(seconds):
    assert answer(f"profile?seconds={seconds}").status == 400


def test_one_profile_at_a_time():
    async def ask():
        one = Profiles()
        request = Request("GET", profiles.PREFIX + "profile", "seconds=0.2")
        first = asyncio.create_task(one.answer(request))
        await asyncio.sleep(0)
        second = await one.answer(request)
        return (await first).status, second.status, (await one.answer(request)).status

    assert asyncio.run(ask()) == (200, 500, 200)


def test_time_that_fell_between_samples_is_told_as_such():
    sampler = Sampler()
    sampler.start()
    sampler.stop()
    assert sampler.taken() == {}
    sampler._used[1] = "busy", 2_000_000_000
    sampler._used[2] = "idle", 0
    assert collapsed(sampler.taken()) == "busy;:(too short to be seen) 2000000\n"


def test_a_profile_that_nobody_waits_for_ends():
    async def ask():
        one = Profiles()
        task = asyncio.create_task(one.answer(Request("GET", profiles.PREFIX + "profile", "seconds=100")))
        await asyncio.sleep(0)
        [sampling] = [thread for thread in threading.enumerate() if thread.name == "profile"]
        task.cancel()
        await asyncio.wait([task])
        await asyncio.to_thread(sampling.join, 20)
        return sampling.is_alive()

    assert asyncio.run(ask()) is False


def test_the_heap_is_counted_by_type():
    text = answer("heap").body.decode()
    assert "its own (USS)" in text
    assert "builtins.dict" in text
    assert "tracemalloc" in text.lower()


def test_threads_and_tasks_are_shown_where_they_are():
    text = answer("goroutine").body.decode()
    assert "thread MainThread" in text
    assert "Profiles.answer" in text


def test_what_there_is_not_is_not_found():
    assert answer("trace").status == 404
    assert answer("").status == 200
    assert answer("cmdline").body == Path("/proc/self/cmdline").read_bytes().rstrip(b"\0")
