"""One agent per network namespace."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from proxy.lock import HeldError, Lock

HOLD = "import sys; from proxy.lock import Lock; lock = Lock(); print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def name(monkeypatch: pytest.MonkeyPatch) -> str:
    """A lock of the test's own: others on this machine don't count."""
    name = f"\0sluice-test-{os.getpid()}"
    monkeypatch.setattr("proxy.lock._NAME", name)
    return name


def test_the_second_one_is_told_who_holds_it(name: str) -> None:
    lock = Lock()
    with pytest.raises(HeldError, match=f"process {os.getpid()}"):
        Lock()
    lock.release()
    Lock().release()


@contextlib.contextmanager
def held_by_another(name: str, afterwards: str = "pass") -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds the lock, and then does something more; it is killed in the end."""
    code = HOLD.replace(
        "lock = Lock()", f"import os, proxy.lock; proxy.lock._NAME = {name!r}; lock = Lock(); {afterwards}"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        yield holder
        holder.kill()


def test_a_process_that_dies_gives_it_back(name: str) -> None:
    with held_by_another(name) as holder, pytest.raises(HeldError, match=f"process {holder.pid}"):
        Lock()
    Lock().release()


@pytest.mark.skipif(os.geteuid() != 0, reason="it takes root to become somebody else")
def test_another_users_process_with_the_name_is_told_for_what_it_is(name: str) -> None:
    as_another = "os.setresuid(1234, 1234, 1234); lock._socket.listen(1)"  # as it is then, others see it
    with (
        held_by_another(name, as_another) as holder,
        pytest.raises(HeldError, match=f"process {holder.pid} of user 1234, which is no agent, .* end it"),
    ):
        Lock()
