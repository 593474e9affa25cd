import asyncio
import os
import socket
from pathlib import Path

import pytest

from proxy.sd_notify import Supervisor


class Listener:
    """systemd's end of the socket."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address)
        self._socket.settimeout(20)

    def heard(self) -> list[str]:
        return self._socket.recv(4096).decode().split("\n")

    def everything(self) -> list[str]:
        self._socket.setblocking(False)
        lines: list[str] = []
        try:
            while True:
                lines += self.heard()
        except BlockingIOError:
            return lines

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def listener(tmp_path: Path):
    listener = Listener(str(tmp_path / "notify"))
    yield listener
    listener.close()


@pytest.fixture
def supervisor(tmp_path: Path, listener: Listener) -> Supervisor:
    return Supervisor({"NOTIFY_SOCKET": str(tmp_path / "notify")})


def test_ready_is_told_once(supervisor, listener):
    supervisor.ready()
    supervisor.ready()
    assert listener.everything().count("READY=1") == 1


def test_an_abstract_name_is_understood():
    name = f"sluice-test-{os.getpid()}"
    listener = Listener("\0" + name)
    try:
        Supervisor({"NOTIFY_SOCKET": "@" + name}).ready()
        assert "READY=1" in listener.heard()
    finally:
        listener.close()


def test_a_reload_says_when_it_began_and_that_it_is_over(supervisor, listener):
    supervisor.ready()
    listener.heard()
    supervisor.reloading()
    began, when = listener.heard()
    assert began == "RELOADING=1"
    assert when.removeprefix("MONOTONIC_USEC=").isdigit()
    supervisor.reloaded()
    assert listener.heard() == ["READY=1"]


def test_a_reload_before_the_first_sync_does_not_make_it_ready(supervisor, listener):
    supervisor.reloading()
    supervisor.reloaded()
    assert listener.everything() == []


def test_a_change_that_nobody_asked_for_is_no_reload(supervisor, listener):
    supervisor.ready()
    listener.heard()
    supervisor.reloaded()
    assert listener.everything() == []


def test_the_end_is_announced(supervisor, listener):
    supervisor.stopping()
    assert "STOPPING=1" in listener.heard()


def test_the_watchdog_hears_from_the_event_loop_until_that_is_cancelled(tmp_path, listener):
    environment = {
        "NOTIFY_SOCKET": str(tmp_path / "notify"),
        "WATCHDOG_USEC": "20000",
        "WATCHDOG_PID": str(os.getpid()),
    }

    async def live() -> None:
        beating = asyncio.create_task(Supervisor(environment).run())
        heard = await asyncio.to_thread(lambda: [listener.heard() for _ in range(4)])
        beating.cancel()
        assert heard[1:] == [["WATCHDOG=1"]] * 3

    asyncio.run(live())


def test_half_of_the_time_allowed_lies_between_two_signs_of_life(tmp_path, listener, monkeypatch):
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        raise asyncio.CancelledError

    monkeypatch.setattr(asyncio, "sleep", sleep)
    supervisor = Supervisor({"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "30000000"})
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(supervisor.run())
    assert slept == [15.0]


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WATCHDOG_USEC": "0"},
        {"WATCHDOG_USEC": "-1"},
        {"WATCHDOG_USEC": "soon"},
        {"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"},
    ],
)
def test_nobody_watches(environment):
    """A variable that is inherited from somebody else's supervisor (WATCHDOG_PID) is not meant for us."""
    assert Supervisor(environment).watchdog is None
    asyncio.run(Supervisor(environment).run())


@pytest.mark.parametrize("name", ["", "/nonexistent/notify", "@sluice-nobody-listens"])
def test_a_supervisor_that_does_not_listen_is_no_trouble(name):
    supervisor = Supervisor({"NOTIFY_SOCKET": name})
    supervisor.ready()
    supervisor.reloading()
    supervisor.stopping()


def test_a_full_socket_does_not_hold_up_the_event_loop(supervisor, listener):
    for _ in range(2000):
        supervisor.stopping()
    assert listener.heard()
