"""A headless Chromium, driven over its DevTools protocol: clicks and keys as a person's, and screenshots."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
TIMEOUT = 120
SIZE = (1300, 1500)


class Tab:
    """A page of the browser.

    Args:
        socket: Connection to it.
    """

    def __init__(self, socket: Any) -> None:
        self._socket, self._numbers = socket, itertools.count(1)

    def call(self, method: str, **parameters: object) -> dict[str, Any]:
        """Call a method of the protocol; returns its result."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=TIMEOUT))
            if message.get("id") == number:
                assert "error" not in message, (method, parameters, message["error"])
                return message["result"]

    def evaluate(self, expression: str) -> Any:
        """The JSON value of a JavaScript expression; of a promise, what it resolves to."""
        options = {"returnByValue": True, "awaitPromise": True}
        result = self.call("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in result, (expression, result["exceptionDetails"])
        return result["result"].get("value")

    def wait(self, expression: str, timeout: float = TIMEOUT) -> Any:
        """Wait until an expression is true; returns its value."""
        end = time.monotonic() + timeout
        while not (value := self.evaluate(expression)):
            shown = self.evaluate("document.body.innerText")
            assert time.monotonic() < end, f"{expression} stays false; the page shows {shown}"
            time.sleep(0.1)
        return value

    def click(self, selector: str, text: str | None = None) -> None:
        """Click in the middle of an element, or of the one that shows a text."""
        chosen = "true" if text is None else f"e.innerText.trim() === {json.dumps(text)}"
        find = f"[...document.querySelectorAll({json.dumps(selector)})].find(e => {chosen})"
        self.wait(f"Boolean({find})")
        box = self.evaluate(
            f"(() => {{const e = {find}; e.scrollIntoView({{block: 'center'}}); const r = e.getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2]})()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            place = {"x": box[0], "y": box[1], "button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, **place)

    def key(self, name: str, code: int) -> None:
        """Press a key."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code)

    def type(self, selector: str, text: str) -> None:
        """Replace the text of a field by typing, and leave the field."""
        self.click(selector)
        self.evaluate("document.activeElement.select()")
        self.call("Input.insertText", text=text)
        self.key("Tab", 9)

    def choose(self, selector: str, option: str) -> None:
        """Choose an option of a dropdown."""
        self.click(f"{selector} input")
        self.click("[role=option]", option)

    def bytes_of(self, address: str) -> bytes:
        """Content of an address, fetched by the page."""
        reader = (
            f"fetch({json.dumps(address)}).then(r => r.arrayBuffer()).then(b => {{let s = '';"
            "for (const x of new Uint8Array(b)) s += String.fromCharCode(x); return btoa(s)})"
        )
        return base64.b64decode(self.evaluate(reader))

    def screenshot(self, path: Path) -> None:
        """Write what the page shows as a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def opened(address: str, profile: Path) -> Iterator[Tab]:
    """Open an address in a browser of its own."""
    from websockets.sync.client import connect

    assert CHROMIUM is not None
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-port=0"]
    flags += [f"--user-data-dir={profile}", f"--window-size={SIZE[0]},{SIZE[1]}", "--no-first-run"]
    with subprocess.Popen(
        [CHROMIUM, *flags, "about:blank"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as it:
        try:
            tab = wait_for(lambda: _first_tab(profile / "DevToolsActivePort"))
            with connect(tab, max_size=1 << 28, proxy=None) as socket:
                page = Tab(socket)
                page.call("Page.enable")
                page.call("Page.navigate", url=address)
                page.wait("document.readyState === 'complete'")
                yield page
        finally:
            it.terminate()
            it.wait(timeout=TIMEOUT)


def wait_for(condition: Callable[[], Any], timeout: float = TIMEOUT) -> Any:
    """Wait until a function returns something; returns that."""
    end = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < end, condition
        time.sleep(0.1)
    return value


def _first_tab(port_file: Path) -> str | None:
    import urllib.request

    if not port_file.exists() or len(lines := port_file.read_text().split()) < 2:
        return None
    with urllib.request.urlopen(f"http://127.0.0.1:{lines[0]}/json/list", timeout=TIMEOUT) as reply:
        pages = [entry for entry in json.load(reply) if entry["type"] == "page"]
    return pages[0]["webSocketDebuggerUrl"] if pages else None
