"""Chromium without a window, driven over its own DevTools protocol: JSON messages through two
pipes, no driver.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import time
from contextlib import suppress

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# no network traffic of the browser itself, so that every observed request is the page's
QUIET = (
    *(
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
    ),
    *(
        "--disable-component-update",
        "--disable-sync",
        "--disable-extensions",
        "--remote-debugging-pipe",
    ),
)
TIMEOUT_SECONDS = 60


def installed():
    """The path of a browser, None if there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One tab of a browser that is started for it; `requests` are the addresses that its page
    requested.
    """

    def __init__(self, profile):
        read, their_write = os.pipe()
        their_read, self._write = os.pipe()
        self._read, self._buffer, self._number = read, b"", 0
        self.requests, self.complaints = [], []
        silence = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
        # moved out of the way first, since either end may have one of the numbers that the browser
        # wants
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (their_read, their_write)]
        pipes = [(os.POSIX_SPAWN_DUP2, end, fd) for end, fd in zip(ends, (3, 4), strict=True)]
        command = [installed(), *QUIET, f"--user-data-dir={profile}", "about:blank"]
        self._process = os.posix_spawn(
            command[0], command, os.environ, file_actions=[*silence, *pipes], setpgroup=0
        )
        for end in (their_read, their_write, *ends):
            os.close(end)
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = None
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def open(self, address, width=1200, height=900):
        """Open a page in a window of this size and wait until it is loaded."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        self._call("Page.navigate", url=address)
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while self.run("document.readyState + location.href") != f"complete{address}":
            assert time.monotonic() < deadline, f"{address} did not load"

    def run(self, script):
        """The value of an expression in the page."""
        answer = self._call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def click(self, selector):
        """Click in the middle of the first element that matches the selector."""
        found = f"document.querySelector({json.dumps(selector)})"
        box = self.run(
            f"(() => {{ {found}.scrollIntoView({{block: 'center', inline: 'center'}});"
            f" const box = {found}.getBoundingClientRect();"
            f" return [box.x + box.width / 2, box.y + box.height / 2]; }})()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self._call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=box[0],
                y=box[1],
                button="left",
                clickCount=1,
            )

    def screenshot(self, path):
        """Write the whole page to a PNG file."""
        picture = self._call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(picture))

    def close(self):
        """End the browser and all its processes."""
        with suppress(ProcessLookupError):
            os.killpg(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        os.close(self._read)
        os.close(self._write)

    def _call(self, method, **params):
        self._number += 1
        session = {"sessionId": self._session} if getattr(self, "_session", None) else {}
        message = {"id": self._number, "method": method, "params": params} | session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._heed(answer.get("method"), answer.get("params", {}))

    def _heed(self, event, params):
        if event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        if event in ("Runtime.exceptionThrown", "Log.entryAdded"):
            self.complaints.append(params)

    def _message(self):
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], TIMEOUT_SECONDS)
            assert ready, "the browser does not answer"
            part = os.read(self._read, 1 << 16)
            assert part, "the browser has ended"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)
