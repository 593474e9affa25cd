"""Listeners that somebody has closed behind a worker's back, as `ss -K` does."""

from __future__ import annotations

import subprocess

from proxy.userspace.control import Done, Drain
from tests.netns.userspace.rig import VIP, Serve, Start, Worker, ask, frontend, route, until


def with_a_listener_that_is_gone(start: Start, serve: Serve) -> Worker:
    worker = start()
    backend = serve("10.96.1.1").backend
    worker.apply({frontend(VIP): route(backend)})
    assert ask(VIP) == "10.96.1.1"
    subprocess.run(["ss", "-K", "-H", "-t", "-l", "src", VIP], check=True, stdout=subprocess.DEVNULL)
    return worker


def test_a_listener_that_is_gone_comes_back_with_its_frontend(start: Start, serve: Serve) -> None:
    worker = with_a_listener_that_is_gone(start, serve)
    worker.apply(removed=[frontend(VIP)])
    worker.apply({frontend(VIP): route(serve("10.96.1.2").backend)})
    assert ask(VIP) == "10.96.1.2"


def test_a_listener_that_is_gone_keeps_no_worker_from_draining(start: Start, serve: Serve) -> None:
    worker = with_a_listener_that_is_gone(start, serve)
    assert worker.connection.ask(Drain(60.0)) == Done()
    until(lambda: worker.process.poll() == 0)
