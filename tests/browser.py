"""Headless Chromium for tests: DevTools' protocol over two pipes, which needs nothing beyond the standard library."""

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
SECONDS = 400
FLAGS = [
    "--headless=new", "--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--no-first-run",
    "--disable-extensions", "--remote-debugging-pipe", "--hide-scrollbars", "--disable-background-networking",
]  # fmt: skip


class Browser:
    """One tab of a headless Chromium. `requests` are the addresses that it asked for."""

    def __init__(self, profile: Path, size: tuple[int, int] = (1280, 800), webgl: bool = True):
        assert CHROMIUM
        self._read, theirs_out = os.pipe()
        theirs_in, self._write = os.pipe()
        flags = [*FLAGS, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}"]
        flags += [] if webgl else ["--disable-3d-apis"]
        # Chromium reads from descriptor 3 and writes to 4.
        script = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", CHROMIUM, *flags, "about:blank"],
            pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self._rest, self._number, self._session = b"", 0, None
        self.requests: list[str] = []
        self.messages: list[str] = []
        found = self.call("Target.getTargets")["targetInfos"]
        tab = next(t["targetId"] for t in found if t["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(20)
        os.close(self._read)
        os.close(self._write)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command and return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        while True:
            answer = self._next()
            if answer.get("method") == "Network.requestWillBeSent":
                self.requests.append(answer["params"]["request"]["url"])
            elif answer.get("method") == "Runtime.exceptionThrown":
                self.messages.append(json.dumps(answer["params"]["exceptionDetails"])[:2000])
            elif answer.get("method") == "Runtime.consoleAPICalled":
                self.messages.append(" ".join(str(a.get("value", "")) for a in answer["params"]["args"]))
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, address: str, ready: str = "document.readyState === 'complete'") -> None:
        """Go to a page and wait until an expression is true there."""
        self.call("Page.navigate", url=address)
        end = time.monotonic() + SECONDS
        while not self.run(ready):
            assert time.monotonic() < end, f"{address} did not get ready: {self.messages}"
            time.sleep(0.1)

    def run(self, expression: str) -> Any:
        """Return what an expression is in the page; promises are awaited."""
        out = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in out, out["exceptionDetails"]
        return out["result"].get("value")

    def screenshot(self, path: Path, width: int, height: int, scale: float = 1, mobile: bool = False) -> None:
        """Write what the tab shows at a size, as PNG."""
        self.resize(width, height, scale, mobile)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def resize(self, width: int, height: int, scale: float = 1, mobile: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=mobile
        )
        self.run("new Promise((done) => setTimeout(done, 1500))")

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._read, 1 << 20)
            assert part, "the browser has ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)
