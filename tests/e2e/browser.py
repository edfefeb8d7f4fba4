"""A real browser for tests: Debian's Chromium without a screen, driven over a pipe (DevTools protocol).

Everything waits for a condition: for an answer of the protocol, an event, or an expression that becomes true.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PATIENCE_S = 60.0
"""A hung browser ends the test after so long; nothing on these pages takes a tenth of it."""

_DUPLICATE = (
    "import fcntl, os, sys\n"
    "ours = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]\n"
    "os.dup2(ours[0], 3); os.dup2(ours[1], 4)\n"
    "os.execvp(sys.argv[3], sys.argv[3:])"
)
"""Chromium talks over its descriptors 3 and 4, which subprocess can't give it."""

_PLACE = """(selector) => {
  const it = document.querySelector(selector);
  if (!it || it.disabled) return null;
  it.scrollIntoView({block: 'center', behavior: 'instant'});
  const box = it.getBoundingClientRect();
  const place = [box.x + box.width / 2, box.y + box.height / 2];
  const before = it.placeBefore;
  it.placeBefore = place;
  return it.contains(document.elementFromPoint(...place)) && before?.join() === place.join() && place;
}"""


class Chromium:
    """One browser process and the pipe to it."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("chromium")
        assert program, "chromium is missing; tests/system.sh installs it"
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        os.set_blocking(self._read, False)
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
        flags += ["--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"]
        flags += ["--disable-popup-blocking", f"--user-data-dir={folder}", "about:blank"]
        start = [sys.executable, "-c", _DUPLICATE, str(to_read), str(to_write), program, *flags]
        self.process = subprocess.Popen(
            start, pass_fds=(to_read, to_write), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        os.close(to_read)
        os.close(to_write)
        self._rest = b""
        self._number = 0
        self._answers: dict[int, dict[str, Any]] = {}
        self.pages: dict[str, Page] = {}

    def close(self) -> None:
        """End the browser."""
        with contextlib.suppress(OSError, AssertionError):
            self.call("Browser.close")
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(20)
        os.close(self._read)
        os.close(self._write)

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Ask and wait for the answer."""
        self._number += 1
        number = self._number
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        until_s = time.monotonic() + PATIENCE_S
        while number not in self._answers:
            assert time.monotonic() < until_s, f"the browser does not answer {method}"
            self.read(until_s)
        answer = self._answers.pop(number)
        assert "error" not in answer, f"{method}: {answer['error']}"
        found: dict[str, Any] = answer["result"]
        return found

    def read(self, until_s: float) -> None:
        """Take what has come, waiting for the first of it."""
        if not select.select([self._read], [], [], max(0.0, until_s - time.monotonic()))[0]:
            return
        data = os.read(self._read, 1 << 20)
        assert data, "the browser has ended"
        *whole, self._rest = (self._rest + data).split(b"\0")
        for raw in whole:
            message = json.loads(raw)
            if "id" in message:
                self._answers[message["id"]] = message
            elif message.get("sessionId") in self.pages:
                self.pages[message["sessionId"]].take(message["method"], message["params"])

    @contextlib.contextmanager
    def page(self, url: str, *, dark: bool = False, size: tuple[int, int] = (1200, 900)) -> Iterator[Page]:
        """A page in a context of its own: no cookie, cache or storage of another."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self.pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Network", "Log", "Audits"):
            page.call(f"{domain}.enable")
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        width, height = size
        page.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        page.call("Page.navigate", url=url)
        try:
            yield page
        finally:
            del self.pages[session]
            self.call("Target.disposeBrowserContext", browserContextId=context)


@dataclass(slots=True)
class Page:
    """One page.  complaints: errors of its console, its scripts and its policy.  requests: the URLs it asked for."""

    browser: Chromium
    session: str
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Ask this page."""
        return self.browser.call(method, self.session, **params)

    def take(self, method: str, params: dict[str, Any]) -> None:
        """An event of the protocol."""
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.complaints.append(json.dumps([item.get("value") for item in params["args"]]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.complaints.append(json.dumps(params["entry"]))
        elif method == "Audits.issueAdded" and params["issue"]["code"] == "ContentSecurityPolicyIssue":
            self.complaints.append(json.dumps(params["issue"]))

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives, promises awaited."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def until(self, expression: str) -> Any:
        """Wait until an expression is true and return it.  The page itself looks, whenever something changes."""
        watched = (
            f"new Promise((done) => {{ const look = () => {{ let found; try {{ found = ({expression}); }} catch {{}} "
            "if (found) { observer.disconnect(); clearInterval(timer); done(found instanceof Node || found); } }; "
            "const observer = new MutationObserver(look); const timer = setInterval(look, 50); "
            "observer.observe(document, {subtree: true, childList: true, attributes: true, characterData: true}); "
            "look(); })"
        )
        until_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                return self.value(watched)
            except AssertionError as error:
                # The page was left for the next one while it was asked.
                if "context" not in str(error) or time.monotonic() > until_s:
                    raise

    def click(self, selector: str) -> None:
        """Press the middle of the first element of that selector, once it is there, on top and at rest."""
        x, y = self.until(f"({_PLACE})({json.dumps(selector)})")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, selector: str, text: str) -> None:
        """Click into a field, empty it and type."""
        self.click(selector)
        self.value(f"document.querySelector({json.dumps(selector)}).select()")
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int) -> None:
        """Press a key that is no character."""
        for kind in ("rawKeyDown", "char", "keyUp"):
            text = {"text": "\r"} if kind == "char" and key == "Enter" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def picture(self, path: Path) -> bytes:
        """What is to be seen, as PNG, also in the file."""
        data = base64.b64decode(self.call("Page.captureScreenshot")["data"])
        path.write_bytes(data)
        return data

    def origins(self) -> set[str]:
        """Where its requests went; data: and blob: go nowhere."""
        parts = [urlsplit(url) for url in self.requests]
        return {f"{part.scheme}://{part.netloc}" for part in parts if part.scheme not in ("data", "blob")}


@contextlib.contextmanager
def chromium(folder: Path) -> Iterator[Chromium]:
    """A browser with a fresh profile in folder."""
    browser = Chromium(folder)
    try:
        yield browser
    finally:
        browser.close()
