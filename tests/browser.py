"""A headless chromium for tests, spoken to over its DevTools pipe (--remote-debugging-pipe): no package, no port."""

import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--window-size=1200,900", "--remote-debugging-pipe"]  # fmt: skip
# the browser reads commands from file descriptor 3 and answers on 4
LAUNCH = "import fcntl, os, sys; r, w = (fcntl.fcntl(int(x), fcntl.F_DUPFD, 10) for x in sys.argv[1:3]); \
os.dup2(r, 3); os.dup2(w, 4); os.execvp(sys.argv[3], sys.argv[3:])"
PATIENCE = 30.0  # seconds; only a broken page takes so long


class Browser:
    """One page of a headless browser. `asked`: every address that it has asked for; `problems`: errors of its console."""

    def __init__(self, profile: Path):
        self.asked, self.problems, self.number, self.rest, self.session = [], [], 0, b"", None
        read_end, self.write = os.pipe()
        self.read, write_end = os.pipe()
        command = [
            sys.executable,
            "-c",
            LAUNCH,
            str(read_end),
            str(write_end),
            CHROMIUM,
            *FLAGS,
            f"--user-data-dir={profile}",
        ]
        self.process = subprocess.Popen(command, pass_fds=(read_end, write_end), stderr=subprocess.DEVNULL)
        os.close(read_end)
        os.close(write_end)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        os.close(self.write)  # which ends the browser
        os.close(self.read)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def message(self) -> dict:
        """The next answer or event."""
        due = time.monotonic() + PATIENCE
        while b"\0" not in self.rest:
            if not select.select([self.read], [], [], max(0, due - time.monotonic()))[0]:
                raise TimeoutError("The browser says nothing.")
            fresh = os.read(self.read, 1 << 20)
            if not fresh:
                raise RuntimeError("The browser has ended.")
            self.rest += fresh
        line, self.rest = self.rest.split(b"\0", 1)
        message = json.loads(line)
        if message.get("method") == "Network.requestWillBeSent":
            self.asked.append(message["params"]["request"]["url"])
        elif message.get("method") == "Runtime.exceptionThrown":
            self.problems.append(message["params"]["exceptionDetails"])
        elif message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
            self.problems.append(message["params"]["entry"]["text"])
        return message

    def call(self, method: str, **params) -> dict:
        self.number += 1
        command = {"id": self.number, "method": method, "params": params}
        if self.session:
            command["sessionId"] = self.session
        os.write(self.write, json.dumps(command).encode() + b"\0")
        while (message := self.message()).get("id") != self.number:
            pass
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']}")
        return message["result"]

    def open(self, address: str) -> None:
        """Loads a page anew, to its load event."""
        self.asked.clear()
        self.problems.clear()
        self.call(
            "Page.navigate", url="about:blank"
        )  # an address that differs in the #part only would not load
        self.call("Page.navigate", url=address)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def js(self, code: str):
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{code}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def until(self, code: str) -> None:
        """Waits until an expression holds."""
        due = time.monotonic() + PATIENCE
        while not self.js(f"!!({code})"):
            if time.monotonic() > due:
                raise TimeoutError(code)
            time.sleep(0.02)

    def key(self, name: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=name,
                text=name if len(name) == 1 and kind == "keyDown" else "",
            )

    def mouse(self, selector: str, click: bool = False) -> None:
        """Moves the mouse to the middle of an element, and clicks."""
        x, y = self.js(f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{ block: 'center' }});"
                       "const b = e.getClientRects()[0]; return [b.x + b.width / 2, b.y + b.height / 2]; })()")  # fmt: skip
        at = {"x": x, "y": y, "button": "left", "clickCount": 1}
        for kind in ("mouseMoved", *(("mousePressed", "mouseReleased") if click else ())):
            self.call(
                "Input.dispatchMouseEvent", type=kind, **(at if kind != "mouseMoved" else {"x": x, "y": y})
            )
