"""The agent's socket: what crosses it, who may use it, and clients that behave badly."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from proxy import agent_socket
from proxy.agent_socket import AgentError, NoAgentError, TableHead, TablePart, request, socket_path
from proxy.serving import agent_server
from proxy.serving.agent_server import AgentServer, RefusedError
from rules.dataplane import Capabilities
from rules.forwarding import Family, ForwardingTable
from tests import strategies
from tests.fakes.polling import eventually

Answer = Callable[[str, dict[str, str]], AsyncGenerator[tuple[str, Any], None]]


async def echo(verb: str, arguments: dict[str, str]) -> AsyncGenerator[tuple[str, Any], None]:
    if verb == "refuse":
        raise RefusedError("no")
    if verb == "break":
        yield "part", 1
        raise ZeroDivisionError("a bug")
    if verb == "flood":
        for number in range(200):
            yield "part", "x" * 100_000
            await asyncio.sleep(0)
            del number
    yield "part", verb
    yield "result", arguments


class Served:
    """A server in a thread of its own, for clients that block."""

    def __init__(self, directory: Path, answer: Answer) -> None:
        self.directory = str(directory)
        self.path = socket_path(self.directory)
        self.server = AgentServer(self.directory, answer)
        self._loop = asyncio.new_event_loop()
        self._task: asyncio.Task[None]
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._task = self._loop.create_task(self.server.run(retry=0.01))
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._task)
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def start(self) -> None:
        self._thread.start()
        asyncio.run(eventually(self._answers))

    def _answers(self) -> bool:
        try:
            request("hello", run_directory=self.directory)
        except AgentError:
            return False
        return True

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()

    def connect(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(20)
        client.connect(str(self.path))
        return client

    def ask(self, data: bytes, *, end: bool = False) -> bytes:
        """What comes back for these bytes."""
        with self.connect() as client, contextlib.suppress(ConnectionError):
            client.sendall(data)
            if end:
                client.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: client.recv(1 << 16), b""))
        return b""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    server = Served(tmp_path / "run", echo)
    server.start()
    yield server
    server.stop()


def error_of(data: bytes) -> str:
    return str(json.loads(data)["error"])


# --- the ordinary way ----------------------------------------------------------------------------------------------


def test_a_request_has_parts_and_a_result(served: Served) -> None:
    answer = request("hello", run_directory=served.directory, name="x")
    assert [json.loads(bytes(part)) for part in answer.parts] == ["hello"]
    assert json.loads(bytes(answer.result)) == {"name": "x"}


def test_what_crosses_the_socket_is_lines_of_json(served: Served) -> None:
    data = served.ask(b'{"version":1,"verb":"hello","arguments":{"a":"b"}}\n')
    assert data == b'{"part":"hello"}\n{"result":{"a":"b"}}\n'


def test_the_socket_and_its_directory_are_for_root_alone(served: Served) -> None:
    assert stat.S_IMODE(served.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(served.path.parent.stat().st_mode) == 0o700


def test_the_socket_is_gone_when_the_agent_is(tmp_path: Path) -> None:
    server = Served(tmp_path, echo)
    server.start()
    server.stop()
    assert not server.path.exists()
    with pytest.raises(NoAgentError, match=r"no agent answers at .*agent\.sock"):
        request("hello", run_directory=server.directory)


def test_a_socket_that_a_killed_agent_left_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(socket_path(str(tmp_path))))
    with pytest.raises(NoAgentError):
        request("hello", run_directory=str(tmp_path))
    server = Served(tmp_path, echo)
    server.start()
    server.stop()


def test_refusals_and_bugs_are_one_line(served: Served) -> None:
    with pytest.raises(AgentError, match=r"the agent says: no$"):
        request("refuse", run_directory=served.directory)
    with pytest.raises(AgentError, match="internal error: ZeroDivisionError: a bug"):
        request("break", run_directory=served.directory)
    request("hello", run_directory=served.directory)


@given(st.sampled_from(Family).flatmap(strategies.tables))
def test_a_table_comes_over_whole(table: ForwardingTable) -> None:
    head = TableHead(
        family=table.family,
        node=table.node,
        dataplane="nftables",
        capabilities=Capabilities(),
        syncs=1,
        pending=False,
        network_namespace=1,
    )
    parts = [TablePart(routes=(pair,)) for pair in table.routes.items()]
    parts.append(TablePart(hairpins=tuple(table.hairpins)))
    lines = [
        *(msgspec.json.encode(agent_socket.Line(part=msgspec.Raw(msgspec.json.encode(part)))) for part in parts),
        msgspec.json.encode(agent_socket.Line(result=msgspec.Raw(msgspec.json.encode(head)))),
    ]
    answer = agent_socket._collect(iter(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent_socket, "request", lambda *_, **__: answer)
        assert agent_socket.table(table.family) == (table, head)


@pytest.mark.parametrize(
    "answer",
    [
        b'{"error": "\xff"}\n',
        b'{"result": "\xff"}\n',
        b"[" * 100_000 + b"\n",
        b"null\n",
        b'{"result": ' + b"[" * 100_000 + b"\n",
    ],
)
def test_an_agent_that_answers_nonsense_is_told_of_in_one_line(tmp_path: Path, answer: bytes) -> None:
    with socket.create_server(str(socket_path(str(tmp_path))), family=socket.AF_UNIX) as server:

        def serve() -> None:
            client, _ = server.accept()
            with client:
                client.recv(1000)
                client.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(AgentError):
            agent_socket.status(str(tmp_path))
        thread.join()


# --- clients that behave badly ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\n", "one line of JSON"),
        (b"hello\n", "one line of JSON"),
        (b"\xff\xfe\n", "one line of JSON"),
        (b"[" * 60_000 + b"\n", "one line of JSON"),
        (b'{"version":1}\n', "verb"),
        (b'{"version":"1","verb":"hello"}\n', "version"),
        (b'{"version":1,"verb":"hello","arguments":{"a":1}}\n', "arguments"),
        (b'{"version":99,"verb":"hello"}\n', "speaks version 1"),
        (b"x" * 200_000, "at most 65536 bytes"),
    ],
)
def test_requests_that_are_none_are_refused_in_one_line(served: Served, data: bytes, words: str) -> None:
    answer = served.ask(data)
    # A client that goes on talking may be cut off before it has read why.
    assert not answer or words in error_of(answer)
    assert answer or len(data) > agent_socket.LONGEST_REQUEST
    request("hello", run_directory=served.directory)


def test_half_a_request_is_refused_when_its_client_says_no_more(served: Served) -> None:
    assert "has no end" in error_of(served.ask(b'{"version":1,', end=True))


def test_clients_that_say_nothing_are_left_after_a_while(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_server, "REQUEST_SECONDS", 0.05)
    assert served.ask(b'{"version":1,') == b""


def test_a_client_that_does_not_read_its_answer_is_left(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_server, "ANSWER_SECONDS", 0.05)
    with served.connect() as client:
        client.sendall(b'{"version":1,"verb":"flood"}\n')
        asyncio.run(eventually(lambda: served.server._connections == 0))
    request("hello", run_directory=served.directory)


def test_a_client_that_leaves_in_the_middle_harms_nobody(served: Served) -> None:
    for _ in range(5):
        with served.connect() as client:
            client.sendall(b'{"version":1,"verb":"flood"}\n')
            client.recv(10)
    request("hello", run_directory=served.directory)


def test_more_connections_than_a_node_needs_are_told_to_come_again(served: Served) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(agent_server.CONNECTIONS):
            stack.enter_context(served.connect())
        asyncio.run(eventually(lambda: served.server._connections == agent_server.CONNECTIONS))
        with pytest.raises(AgentError, match="too many"):
            request("hello", run_directory=served.directory)
    asyncio.run(eventually(lambda: served.server._connections == 0))
    request("hello", run_directory=served.directory)


def test_large_answers_leave_others_their_turn(served: Served) -> None:
    with served.connect() as slow:
        slow.sendall(b'{"version":1,"verb":"flood"}\n')
        slow.recv(1)
        request("hello", run_directory=served.directory)
    answer = request("flood", run_directory=served.directory)
    assert len(answer.parts) == 201


# --- where no socket can be ------------------------------------------------------------------------------------------


def attempt(directory: Path) -> OSError:
    with pytest.raises(OSError, match=r".") as caught:
        agent_server._listen(socket_path(str(directory)))
    return caught.value


def test_a_directory_where_others_may_write_is_not_used(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    assert "others than root may write there" in str(attempt(tmp_path))
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o777, "it is not ours to change"
    assert not list(tmp_path.iterdir())


def test_the_socket_of_an_agent_that_runs_is_left_alone(served: Served) -> None:
    assert "another agent serves it" in str(attempt(Path(served.directory)))
    request("hello", run_directory=served.directory)


def test_a_file_in_the_way_of_the_directory_and_a_path_too_long_have_words(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert attempt(tmp_path / "file").strerror
    assert "too long" in str(attempt(tmp_path / ("x" * 200)))


def test_connections_that_cannot_be_taken_are_told_of_once_for_as_long_as_that_lasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_server, "REST", 0.001)
    failures = [OSError(errno.EMFILE, os.strerror(errno.EMFILE))] * 4
    accept = asyncio.SelectorEventLoop.sock_accept

    async def sock_accept(loop: asyncio.SelectorEventLoop, listener: socket.socket) -> tuple[socket.socket, Any]:
        if failures:
            raise failures.pop()
        return await accept(loop, listener)

    monkeypatch.setattr(asyncio.SelectorEventLoop, "sock_accept", sock_accept)

    async def scenario() -> None:
        task = asyncio.create_task(AgentServer(str(tmp_path / "run"), echo).run())
        path = socket_path(str(tmp_path / "run"))
        await eventually(lambda: path.exists() and not failures)
        assert await asyncio.to_thread(lambda: list(request("hello", run_directory=str(tmp_path / "run")).parts))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    with structlog.testing.capture_logs() as logs:
        asyncio.run(scenario())
    assert [each["reason"] for each in logs if each["log_level"] == "warning"] == ["Too many open files"]


def test_without_a_socket_the_agent_goes_on_warns_once_and_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").write_text("in the way")
    tried: list[Path] = []
    listen = agent_server._listen
    monkeypatch.setattr(agent_server, "_listen", lambda path: tried.append(path) or listen(path))

    async def scenario() -> None:
        server = AgentServer(str(tmp_path / "run"), echo)
        task = asyncio.create_task(server.run(retry=0.001))
        await eventually(lambda: len(tried) > 3)
        (tmp_path / "run").unlink()
        await eventually(lambda: socket_path(str(tmp_path / "run")).exists())
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    # Not by what is on standard error: where lines go is what whoever configured logs last has said.
    with structlog.testing.capture_logs() as told:
        asyncio.run(scenario())
    assert len([each for each in told if "cannot be made" in each["event"]]) == 1


# --- the client, where there is no agent, or an odd one ----------------------------------------------------------


@contextlib.contextmanager
def odd_agent(directory: Path, answer: bytes) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(socket_path(str(directory))))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"", "ended in the middle"),
        (b'{"part": 1}\n', "ended in the middle"),
        (b'{"part": 1}\n{"resu', "ended in the middle"),
        (b"hello\n", "does not understand"),
        (b'{"result": {"version": 7}}\n', "cannot be read"),
    ],
)
def test_an_odd_answer_is_one_line(tmp_path: Path, answer: bytes, words: str) -> None:
    with odd_agent(tmp_path, answer), pytest.raises(AgentError, match=words) as caught:
        agent_socket.status(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_an_agent_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(socket_path(str(tmp_path))))
        listener.listen()
        with pytest.raises(AgentError, match="does not answer"):
            request("hello", run_directory=str(tmp_path), timeout=0.05)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can stop being root")
def test_who_is_not_root_gets_one_line(tmp_path: Path) -> None:
    # /tmp itself may be closed to others, so the directory is in the child's reach by descriptor.
    server = Served(tmp_path / "run", echo)
    server.start()
    code = (
        "import os, sys\nfrom proxy.agent_socket import AgentError, request\nos.setresuid(65534, 65534, 65534)\n"
        "try:\n    request('hello', run_directory=sys.argv[1])\nexcept AgentError as error:\n    print(error)\n"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, server.directory],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[2],
        )
    finally:
        server.stop()
    assert done.stdout.strip().endswith("is for root alone")


def test_the_client_loads_nothing_heavy() -> None:
    heavy = ("asyncio", "aiohttp", "pyroute2", "structlog", "yaml", "prometheus_client")
    code = f"import sys, proxy.status; sys.exit(str([each for each in {heavy} if each in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.stderr == "[]\n"
