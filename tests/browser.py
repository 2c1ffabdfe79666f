"""A real Chromium for tests, over its own DevTools protocol: no driver, and nothing to install besides the browser."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
START_S = 60.0
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--lang=en-GB"),
    *("--disable-background-networking", "--disable-dev-shm-usage", "--remote-debugging-port=0"),
)


def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class PageError(AssertionError):
    """A script that was given to the page has raised, or what was waited for did not come about."""


class Tab:
    """One page. `messages` has what the browser complained of: exceptions, console errors, violations of the policy."""

    def __init__(self, socket: ClientConnection, session: str) -> None:
        self._socket = socket
        self._session = session
        self._number = 0
        self.messages: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.command(f"{domain}.enable")
        self.requested: list[str] = []

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        call = {"id": self._number, "method": method, "params": parameters, "sessionId": self._session}
        self._socket.send(json.dumps(call))
        while True:
            message = json.loads(self._socket.recv(timeout=START_S))
            if message.get("id") == self._number:
                if "error" in message:
                    raise PageError(f"{method}: {message['error']['message']}")
                result: dict[str, Any] = message["result"]
                return result
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        match message.get("method"):
            case "Runtime.exceptionThrown":
                self.messages.append(json.dumps(message["params"]["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if message["params"]["type"] in ("error", "warning", "assert"):
                self.messages.append(json.dumps(message["params"]["args"]))
            case "Log.entryAdded" if message["params"]["entry"]["level"] in ("error", "warning"):
                self.messages.append(message["params"]["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requested.append(message["params"]["request"]["url"])

    def size(self, width: int, height: int, scale: float = 1.0) -> None:
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )

    def scheme(self, scheme: str) -> None:
        """light or dark"""
        self.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def open(self, url: str) -> None:
        self.command("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def js(self, expression: str) -> Any:
        """The value of an expression, or of the promise that it is. Raises PageError where it throws."""
        answer = self.command("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise PageError(details.get("exception", {}).get("description", details["text"]))
        return answer["result"].get("value")

    def wait(self, expression: str, timeout_s: float = 20.0) -> Any:
        """Until the expression is true. Returns its value."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                if value := self.js(expression):
                    return value
            except PageError as error:
                if time.monotonic() > deadline:
                    body = self.js("document.documentElement.innerText")
                    raise PageError(f"{error}; {self.js('location.href')} says: {body}") from None
            if time.monotonic() > deadline:
                body = self.js("document.body.innerText")
                raise PageError(f"{expression} did not become true in {timeout_s:g} s; the page says: {body}")
            time.sleep(0.05)

    def click(self, selector: str) -> None:
        self.wait(f"document.querySelector({json.dumps(selector)}) !== null")
        self.js(f"document.querySelector({json.dumps(selector)}).click()")

    def text(self, selector: str) -> str:
        return str(self.wait(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''") or "")

    def type(self, text: str) -> None:
        """As from a keyboard, into what has the focus."""
        self.command("Input.insertText", text=text)

    def press(self, key: str, code: int) -> None:
        """key and its virtual key code"""
        text = {"Enter": "\r"}.get(key)
        event = {"key": key, "code": key, "windowsVirtualKeyCode": code, **({"text": text} if text else {})}
        self.command("Input.dispatchKeyEvent", type="keyDown", **event)
        self.command("Input.dispatchKeyEvent", type="keyUp", **event)

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.command("Page.captureScreenshot", format="png")["data"]))


class Browser:
    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._number = 0

    def _command(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number -= 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=START_S))
            if message.get("id") == self._number:
                result: dict[str, Any] = message["result"]
                return result

    @contextmanager
    def tab(self) -> Iterator[Tab]:
        """A page in a profile of its own: nothing is stored yet, and what it stores is forgotten."""
        profile = self._command("Target.createBrowserContext")["browserContextId"]
        target = self._command("Target.createTarget", url="about:blank", browserContextId=profile)["targetId"]
        session = self._command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        try:
            yield Tab(self._socket, session)
        finally:
            self._command("Target.disposeBrowserContext", browserContextId=profile)


@contextmanager
def chromium(path: str) -> Iterator[Browser]:
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [path, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            with connect(_address(process, Path(profile)), max_size=None, proxy=None) as socket:
                yield Browser(socket)
        finally:
            process.terminate()
            process.wait(30)


def _address(process: subprocess.Popen[bytes], profile: Path) -> str:
    """Where the browser listens; it writes that into its profile."""
    file = profile / "DevToolsActivePort"
    deadline = time.monotonic() + START_S
    while not file.exists() or len(file.read_text().splitlines()) < 2:
        assert process.poll() is None, "Chromium has ended at its start"
        assert time.monotonic() < deadline, f"Chromium did not start in {START_S:g} s"
        time.sleep(0.05)
    port, path = file.read_text().splitlines()[:2]
    return f"ws://127.0.0.1:{port}{path}"
