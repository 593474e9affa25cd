"""The child process that reads credentials, from its start to its answer.

It can be started before the agent has loaded its own modules, so that the child's 0.2 s pass meanwhile on the other
core: this module loads hardly anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

CHILD = Path(__file__).with_name("credentials_child.py")
SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"

TIDY_TIMEOUT = 2.0
"""Seconds for a child that is told to end, to remove the files that it may have written."""


class Reading:
    """A child that reads a kubeconfig, or the service account of the pod when both names are empty (CFG-15)."""

    def __init__(self, kubeconfig: str, master: str, *, service_account: str = SERVICE_ACCOUNT) -> None:
        options = ["--kubeconfig", kubeconfig, "--master", master, "--service-account", service_account]
        # By path and with -P, so that neither the current directory nor ours shadows a module of the child's.
        self._child = subprocess.Popen(  # noqa: S603  # our own program
            [sys.executable, "-P", str(CHILD), *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    async def answer(self, seconds: float) -> tuple[bytes, int]:
        """What the child wrote and its exit status; it is gone then, whatever happens.

        Raises:
            TimeoutError: it took longer.
        """
        try:
            out, _ = await asyncio.to_thread(self._child.communicate, None, seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError from None
        finally:
            if self._child.returncode is None:
                await asyncio.to_thread(self.end)
        return out, self._child.returncode

    def end(self) -> None:
        """See that the child and what it started are gone: in its session an exec plugin may hang."""
        if self._child.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(TIDY_TIMEOUT)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        if self._child.stdout is not None:
            self._child.stdout.close()
