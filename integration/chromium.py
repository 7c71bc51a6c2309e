"""A headless Chromium for tests, driven by chromedriver over the WebDriver protocol (https://www.w3.org/TR/webdriver2/)."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from integration.machine import program
from integration.nodes import free_port
from integration.workers import eventually

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# What a found element is called in answers (section 12, "web element identifier").
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    """One window. Elements are found by CSS selectors; what is not there is a LookupError."""

    def __init__(self, driver: str, chromium: str, profile: str) -> None:
        self._root = driver
        options = {"binary": chromium, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        capabilities = {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}
        made = self._ask("POST", "/session", {"capabilities": capabilities})
        self._root = f"{driver}/session/{made['sessionId']}"

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._root + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read())["value"]
        except urllib.error.HTTPError as error:
            told = json.loads(error.read())["value"]
            raise LookupError(f"{method} {path} {body}: {told['message'].splitlines()[0]}") from error

    def open(self, url: str) -> None:
        """Load a page."""
        self._ask("POST", "/url", {"url": url})

    def find(self, selector: str, within: str | None = None) -> str:
        """The first such element."""
        return str(self._ask("POST", f"{_place(within)}/element", _by(selector))[ELEMENT])

    def find_all(self, selector: str, within: str | None = None) -> list[str]:
        """All such elements."""
        return [found[ELEMENT] for found in self._ask("POST", f"{_place(within)}/elements", _by(selector))]

    def text(self, element: str) -> str:
        """Its text as it is seen."""
        return str(self._ask("GET", f"/element/{element}/text"))

    def property(self, element: str, name: str) -> Any:
        """What a script would read of it."""
        return self._ask("GET", f"/element/{element}/property/{name}")

    def click(self, element: str) -> None:
        """Click, and wait for nothing."""
        self._ask("POST", f"/element/{element}/click", {})

    def follow(self, element: str) -> None:
        """Click, and wait until the next page is loaded."""
        self.run("window.isLeft = true")
        self.click(element)
        eventually(lambda: bool(self.run("return !window.isLeft && document.readyState == 'complete'")))

    def enter(self, element: str, text: str) -> None:
        """Type into a field, in place of what is there; of a list choose the entry with that text."""
        if self._ask("GET", f"/element/{element}/name") == "select":
            self.click(next(each for each in self.find_all("option", element) if self.text(each) == text))
            return
        self._ask("POST", f"/element/{element}/clear", {})
        self._ask("POST", f"/element/{element}/value", {"text": text})

    def run(self, script: str) -> Any:
        """What a script returns."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": []})

    def run_later(self, script: str) -> Any:
        """What a script gives to its last argument, a function."""
        return self._ask("POST", "/execute/async", {"script": script, "args": []})

    def resize(self, width: int, height: int) -> None:
        """The window's size, in pixels."""
        self._ask("POST", "/window/rect", {"width": width, "height": height})

    def seen(self, selector: str, words: str) -> str | None:
        """The first such element that is visible and has these words and no others, on it or (a field) before it."""
        script = """
            const [selector, words] = arguments, said = (one) => (one.innerText || one.textContent).trim();
            const text = (one) => one.labels && one.labels.length ? said(one.labels[0]).split("\\n")[0].trim() : said(one);
            return [...document.querySelectorAll(selector)].find((one) => one.checkVisibility() && text(one) === words) || null;
        """
        found = self._ask("POST", "/execute/sync", {"script": script, "args": [selector, words]})
        return None if found is None else str(found[ELEMENT])

    def dark(self, is_dark: bool) -> None:
        """What the browser says of the colours that its user likes."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}]
        self._ask("POST", "/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": {"features": features}})

    def screenshot(self, name: str, *, width: int = 1280) -> None:
        """The whole page, into the folder AMQTASK_SCREENSHOTS if there is one."""
        folder = os.environ.get("AMQTASK_SCREENSHOTS")
        if folder:
            self.resize(width, 700)
            height = self.run("return document.documentElement.scrollHeight")
            self.resize(width, min(2400, max(700, height + 150)))
            (Path(folder) / f"{name}.png").write_bytes(base64.b64decode(self._ask("GET", "/screenshot")))

    def close(self) -> None:
        """End the browser."""
        self._ask("DELETE", "")


def _place(within: str | None) -> str:
    return f"/element/{within}" if within else ""


def _by(selector: str) -> dict[str, str]:
    return {"using": "css selector", "value": selector}


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser with a profile of its own. Raises: NodeError where it is not installed and cannot be."""
    binary, driver = program("chromium", "chromium"), program("chromedriver", "chromium-driver")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="amqtask-chromium-", ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            eventually(lambda: _listens(port), what="chromedriver does not answer")
            browser = Browser(f"http://127.0.0.1:{port}", binary, profile)
            try:
                yield browser
            finally:
                browser.close()
        finally:
            process.terminate()
            process.wait(60)


def _listens(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=5) as answer:
            return bool(json.loads(answer.read())["value"]["ready"])
    except OSError:
        return False
