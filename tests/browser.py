"""A real browser without a window, driven through its DevTools protocol.

The protocol goes over two pipes that Chromium inherits, as messages of JSON that end with a null
byte. So no package, no driver and no port of the machine is needed.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PATIENCE = 20.0  # seconds
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_KEYS = {"Enter": 13, "Escape": 27, "Tab": 9}
_TEXTS = {"Enter": "\r"}
_CTRL = 2


def find_chromium() -> str | None:
    """The browser of this machine, if there is one; ``CHROMIUM`` names another."""
    named = os.environ.get("CHROMIUM")
    return named or next(filter(None, map(shutil.which, NAMES)), None)


class BrowserError(AssertionError):
    """The browser says that something went wrong."""


class Tab:
    """A page in a browser, and all that happens there.

    Attributes:
        errors: what was written to the console as an error, and exceptions that nobody caught.
        requests: the addresses that were asked for.
    """

    def __init__(self, process: subprocess.Popen[bytes], writes: int, reads: int) -> None:
        self._process, self._writes, self._reads = process, writes, reads
        self._data = b""
        self._number = 0
        self._session: str | None = None
        self._answers: dict[int, Any] = {}
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: object) -> Any:
        """A command of the protocol, and its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._writes, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE
        while self._number not in self._answers:
            self._read(deadline)
        answer = self._answers.pop(self._number)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of an expression in the page, which may be a promise."""
        said = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in said:
            raise BrowserError(said["exceptionDetails"]["exception"]["description"])
        return said["result"].get("value")

    def wait_for(self, script: str) -> Any:
        """Its value, as soon as that is true."""
        deadline = time.monotonic() + PATIENCE
        while not (value := self.run(script)):
            if time.monotonic() > deadline:
                shown = self.run("document.body.innerText")
                raise BrowserError(f"{script} has not come to pass; shown is:\n{shown}")
            time.sleep(0.02)
        return value

    def text(self, selector: str) -> str:
        """What is to be read in an element."""
        found = self.run(f"document.querySelector({json.dumps(selector)}).innerText")
        assert isinstance(found, str)
        return found

    def focus(self, selector: str) -> None:
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, *, ctrl: bool = False) -> None:
        pressed = {"key": key, "code": key, "windowsVirtualKeyCode": _KEYS[key]}
        pressed["modifiers"] = _CTRL if ctrl else 0
        text = {"text": _TEXTS[key]} if key in _TEXTS and not ctrl else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **pressed, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **pressed)

    def resize(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )

    def prefer(self, **features: str) -> None:
        """Media features by name, with underscores: ``prefers_color_scheme="dark"``."""
        given = [
            {"name": name.replace("_", "-"), "value": value} for name, value in features.items()
        ]
        self.call("Emulation.setEmulatedMedia", features=given)

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _read(self, deadline: float) -> None:
        ready, _, _ = select.select([self._reads], [], [], max(0.0, deadline - time.monotonic()))
        data = os.read(self._reads, 1 << 20) if ready else b""
        if not data:
            raise BrowserError("the browser doesn't answer")
        *messages, self._data = (self._data + data).split(b"\0")
        for message in messages:
            self._take(json.loads(message))

    def _take(self, message: Any) -> None:
        if "id" in message:
            self._answers[message["id"]] = message
            return
        params = message["params"]
        if message["method"] == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"]))
        elif message["method"] == "Runtime.consoleAPICalled" and params["type"] == "error":
            self.errors.append(str(params["args"]))
        elif message["method"] == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif message["method"] == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])


@contextmanager
def browser_tab(chromium: str, folder: Path) -> Iterator[Tab]:
    """A fresh browser with one page, until the block ends.

    Args:
        chromium: the program.
        folder: for what it keeps.
    """
    command = [
        chromium,
        *("--headless=new", "--remote-debugging-pipe", f"--user-data-dir={folder}"),
        *("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
        *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
    ]
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    process = _start(command, theirs_in, theirs_out)
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Tab(process, ours_out, ours_in)
    finally:
        os.close(ours_out)  # which ends it
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
        process.kill()
        process.wait()
        os.close(ours_in)


def _start(command: list[str], reads: int, writes: int) -> subprocess.Popen[bytes]:
    """With its two pipes as descriptors 3 and 4, where Chromium looks for them."""
    script = f'exec "$@" 3<&{reads} 4>&{writes}'
    return subprocess.Popen(
        ["bash", "-c", script, "bash", *command],
        pass_fds=(reads, writes),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
