"""A headless Chromium, driven by chromedriver through plain HTTP (WebDriver): as much of it as the page's tests need.

Both come from Debian's packages chromium and chromium-driver.  Nothing leaves the machine: Chromium's background
requests are off, and whoever needs more starts it in a network namespace of its own.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

CHROMIUM, DRIVER = "chromium", "chromedriver"
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--force-prefers-reduced-motion",
)
_START_SECONDS = 60.0
_ANSWER_SECONDS = 120.0
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"

KEYS = {"down": "\ue015", "up": "\ue013", "enter": "\ue007", "escape": "\ue00c", "tab": "\ue004", "end": "\ue010"}
"""Keys that are no characters, as WebDriver spells them."""


class BrowserError(Exception):
    """The browser refused or did not answer."""


def missing() -> str:
    """What is not installed; empty: nothing."""
    return " and ".join(name for name in (CHROMIUM, DRIVER) if shutil.which(name) is None)


class Browser:
    """A window of a browser of its own, from start to end of a `with` block; in the caller's network namespace."""

    def __init__(self, *, width: int = 1400, height: int = 900, dark: bool = False) -> None:
        self._size = width, height
        self._dark = dark
        self._session = ""

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            # Chromium goes on writing there for a moment after it was told to end.
            profile = stack.enter_context(tempfile.TemporaryDirectory(prefix="sluice-", ignore_cleanup_errors=True))
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self._port = int(probe.getsockname()[1])
            self._process = subprocess.Popen(  # noqa: S603  # a program of Debian's
                [DRIVER, f"--port={self._port}", "--log-level=OFF"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            stack.callback(self._end)
            self._await_driver()
            flags = [*_FLAGS, f"--window-size={self._size[0]},{self._size[1]}", f"--user-data-dir={Path(profile)}"]
            if self._dark:
                flags.append("--blink-settings=preferredColorScheme=0")
            options = {"args": flags, "binary": shutil.which(CHROMIUM)}
            wanted = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}
            self._session = self._ask("POST", "/session", {"capabilities": wanted})["sessionId"]
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    # --- what one does with it -----------------------------------------------------------------------------------

    def open(self, url: str) -> None:
        """Go there, and wait until it is loaded."""
        self._tell("url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns, which sees the arguments as `arguments`."""
        return self._tell("execute/sync", {"script": script, "args": list(arguments)})

    def run_async(self, script: str, *arguments: Any) -> Any:
        """What a script hands to the function that is the last of its arguments."""
        return self._tell("execute/async", {"script": script, "args": list(arguments)})

    def text(self, selector: str) -> str:
        """What can be read in the first element that matches."""
        return str(self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector))

    def click(self, selector: str) -> None:
        self._tell(f"element/{self._find(selector)}/click", {})

    def type(self, keys: str) -> None:
        """Press keys, whatever has the focus."""
        actions = [{"type": each, "value": key} for key in keys for each in ("keyDown", "keyUp")]
        self._tell("actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def until(self, script: str, *arguments: Any, seconds: float = 30.0) -> Any:
        """What a script returns, as soon as that is true.

        Raises:
            BrowserError: it never is.
        """
        end = time.monotonic() + seconds
        while not (found := self.run(script, *arguments)):
            if time.monotonic() > end:
                raise BrowserError(f"it did not come to hold: {script}")
            time.sleep(0.05)
        return found

    def screenshot(self, path: Path) -> None:
        """The window as a PNG file."""
        path.write_bytes(base64.b64decode(self._tell("screenshot", None)))

    def complaints(self) -> list[str]:
        """What the console has said of errors and violations since the last call."""
        entries = self._tell("se/log", {"type": "browser"})
        return [each["message"] for each in entries if each["level"] in {"SEVERE", "WARNING"}]

    # --- WebDriver -----------------------------------------------------------------------------------------------

    def _find(self, selector: str) -> str:
        return str(self._tell("element", {"using": "css selector", "value": selector})[_ELEMENT])

    def _tell(self, what: str, body: dict[str, Any] | None) -> Any:
        return self._ask("GET" if body is None else "POST", f"/session/{self._session}/{what}", body)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_ANSWER_SECONDS)
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {"Content-Type": "application/json"})
            answer = json.loads(connection.getresponse().read())["value"]
        except OSError as error:
            raise BrowserError(f"{DRIVER} does not answer: {error}") from None
        finally:
            connection.close()
        if isinstance(answer, dict) and "error" in answer:
            raise BrowserError(f"{answer['error']}: {answer['message'].splitlines()[0]}")
        return answer

    def _await_driver(self) -> None:
        end = time.monotonic() + _START_SECONDS
        while True:
            with contextlib.suppress(BrowserError):
                if self._ask("GET", "/status")["ready"]:
                    return
            if time.monotonic() > end or self._process.poll() is not None:
                raise BrowserError(f"{DRIVER} does not start")
            time.sleep(0.05)

    def _end(self) -> None:
        with contextlib.suppress(BrowserError):
            if self._session:
                self._ask("DELETE", f"/session/{self._session}")
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
