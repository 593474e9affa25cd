"""What tests of the running agent ask of a world: who answers, what nft and HTTP servers inside it say, and when."""

from __future__ import annotations

import http.client
import subprocess
import time
from collections.abc import Callable
from typing import NamedTuple

from proxy.demo.probes import Probe
from proxy.demo.world import World
from tests.netns.agent import DEADLINE
from tests.netns.runner import ANSWER, DROP


class Reply(NamedTuple):
    """An HTTP answer."""

    status: int
    body: str
    headers: dict[str, str]


def eventually(holds: Callable[[], object], what: str = "it", seconds: float = DEADLINE) -> None:
    """Return once `holds()` is true.

    Raises:
        AssertionError: it is not within the time after which anything counts as stuck.
    """
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{what} did not come to hold in time"
        time.sleep(0.02)


def answering(world: World, host: str, address: str, port: int, *, count: int = 40, protocol: str = "TCP") -> set[str]:
    """Which hosts answer so many connections, made all at once; what else came of one, where it was not answered."""
    probe = Probe(host=host, address=address, port=port, protocol=protocol, count=count, timeout=ANSWER)
    [outcomes] = world.probes.probe(probe)
    return {outcome.host or str(outcome) for outcome in outcomes}


def dropped(world: World, host: str, address: str, port: int, *, protocol: str = "TCP") -> bool:
    """Whether a connection meets silence."""
    probe = Probe(host=host, address=address, port=port, protocol=protocol, timeout=DROP)
    [[outcome]] = world.probes.probe(probe)
    return outcome.kind == "silent"


def one_after_the_other(world: World, host: str, address: str, port: int, count: int = 6) -> list[str]:
    """Which hosts answer connections that are made one after the other."""
    probe = Probe(host=host, address=address, port=port, timeout=ANSWER)
    return [world.probes.probe(probe)[0][0].host for _ in range(count)]


def nft(world: World, *arguments: str, host: str = "node1") -> str:
    """What the nft program says inside a host."""
    return said(world, "nft", *arguments, host=host)


def said(world: World, program: str, *arguments: str, host: str = "node1") -> str:
    """What a program says inside a host, where it succeeds."""
    done = world.namespaces[host].inside(
        lambda: subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    )
    assert done.returncode == 0, f"{program} {' '.join(arguments)}: {done.stderr}"
    return done.stdout


def get(world: World, host: str, address: str, port: int, path: str = "/") -> Reply | None:
    """A server's answer to a client inside a host; None if there is no server."""

    def inside() -> Reply | None:
        connection = http.client.HTTPConnection(address, port, timeout=ANSWER)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return Reply(answer.status, answer.read().decode(), dict(answer.getheaders()))
        except ConnectionRefusedError:
            return None
        finally:
            connection.close()

    return world.namespaces[host].inside(inside)
