"""The console in a headless Chromium, over a real RabbitMQ with a worker of ours: every page and what can be done there."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from amqtask.console.web import PAGES
from amqtask.history.index import Overtaken
from integration.axe import faults
from integration.chromium import Browser, chromium
from integration.conftest import Broker
from integration.machine import free_port
from integration.nodes import NodeError
from integration.test_history import SAMPLE, Kept
from integration.workers import LoggedProcess, eventually

if TYPE_CHECKING:
    from amqtask.ground.shapes import EventFields

HOSTILE = "<img src=x onerror=window.isOwned=1>"


class Served:
    """`amqtask console` of an application of a test's own, and a browser."""

    def __init__(self, kept: Kept, browser: Browser) -> None:
        self.kept = kept
        self.browser = browser
        self.port = free_port()
        command = [sys.executable, "-m", "amqtask", "-A", SAMPLE, "console", "-p", str(self.port)]
        self.process = LoggedProcess(command, ready="for this machine only", environment=kept.environment)

    def open(self, path: str) -> None:
        self.browser.open(f"http://127.0.0.1:{self.port}{path}")

    def listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    @property
    def main(self) -> str:
        # In one step: a page that is live may be another one between finding and reading.
        return str(self.browser.run("return document.querySelector('main').innerText"))


@pytest.fixture
def served(rabbit: Broker, tmp_path: Path) -> Iterator[Served]:
    kept = Kept(rabbit.url, rabbit.queue("console"), tmp_path, SAMPLE_HISTORY_ARGUMENTS="1")
    try:
        with chromium() as browser:
            made = Served(kept, browser)
            with made.process:
                eventually(made.listens, what=lambda: made.process.log)
                yield made
    except NodeError as error:
        pytest.skip(str(error))
    finally:
        kept.close()
        channel = rabbit.channel()
        channel.queue_delete(kept.history_queue)
        channel.exchange_delete(f"{kept.history_queue}.events")


class Person:
    """Knows no address and no selector: uses the links, buttons and fields that it sees, by their words, and counts clicks."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self.clicks = 0

    def press(self, words: str, *, asks: bool = False) -> None:
        """A link or a button that leads to another page; with `asks` a question is answered with yes."""
        self._browser.run("window.confirm = () => { sessionStorage.setItem('asked', 'yes'); return true; }")
        self._on("a, button", words, self._browser.follow)
        assert (self._browser.run("return sessionStorage.getItem('asked')") == "yes") is asks
        self._browser.run("sessionStorage.removeItem('asked')")
        self.clicks += asks

    def unfold(self, words: str) -> None:
        """Show what is folded."""
        self._on("summary", words, self._browser.click)

    def write(self, label: str, text: str) -> None:
        """Into a field, in place of what is there."""
        self._on("input, textarea", label, lambda field: self._browser.enter(field, text))

    def reads(self, *words: str) -> None:
        """Wait until the page says all that."""
        eventually(lambda: all(word in self._page() for word in words), what=self._page)

    def field(self, label: str) -> str:
        """What is in a field."""
        found = self._browser.seen("input, textarea", label)
        assert found is not None, self._page()
        return str(self._browser.property(found, "value"))

    def _page(self) -> str:
        """What it says; a page that is live may be another one between finding and reading."""
        said: list[str] = []

        def read() -> bool:
            try:
                said.append(self._browser.text(self._browser.find("main")))
            except LookupError:
                return False
            return True

        eventually(read, what="there is no page")
        return said[0]

    def _on(self, selector: str, words: str, act: Callable[[str], object]) -> None:
        """A page that is live may be another one a moment later."""

        def done() -> bool:
            found = self._browser.seen(selector, words)
            if found is None:
                return False
            try:
                act(found)
            except LookupError:
                return False
            return True

        eventually(done, what=lambda: f"there is no {words!r} in {self._page()}")
        self.clicks += 1


def _yesterday(kept: Kept, task_id: str) -> None:
    """A mail that could not be sent, twenty hours ago, as its worker told of it."""
    at = time.time() - 20 * 3600
    told = {"uuid": task_id, "hostname": "w1@mail", "name": "sample.check_mail", "queue": kept.queue}
    events: list[EventFields] = [
        {**told, "type": "task-received", "timestamp": at, "args": "('ann@exmaple.org', 3)", "kwargs": "{}"},
        {**told, "type": "task-started", "timestamp": at + 0.1},
        {**told, "type": "task-failed", "timestamp": at + 0.6, "exception": "ValueError('no server takes mail for exmaple.org')",
         "traceback": "Traceback (most recent call last):\n  …\nValueError: no server takes mail for exmaple.org"},
    ]  # fmt: skip
    index = kept.app.history.index

    def is_told() -> bool:
        position = index.position()
        try:
            return bool(index.take(events, before=position, now=position))
        except Overtaken:  # the console reads meanwhile
            return False

    eventually(is_told)


def test_who_sees_it_first_finds_yesterdays_mail_corrects_it_and_pauses_its_queue(
    served: Served, rabbit: Broker
) -> None:
    kept, browser = served.kept, served.browser
    person = Person(browser)
    served.open("/")
    with kept.worker("-P", "threads", "-n", "w1@console"):
        for number in range(40):
            kept.app.send_task("sample.add", (number, 1))
        kept.app.send_task("sample.fail", (HOSTILE,))
        buried = kept.app.send_task("sample.nobody_knows", (1,))
        kept.succeeded(40)
        _yesterday(kept, "mail-1")
        eventually(lambda: list(kept.states().values()).count("FAILURE") == 3, what=lambda: str(kept.states()))
        # The page that was open has followed, without a reload.
        person.reads("sample.fail: ValueError")
        browser.screenshot("console-overview")
        browser.dark(True)
        browser.screenshot("console-overview-dark")

        person.press("Failures")
        person.reads("1 × sample.check_mail: ValueError")
        browser.screenshot("console-failures")
        person.press("ValueError('no server takes mail for exmaple.org')")
        person.reads("Traceback", "('ann@exmaple.org', 3)", "w1@mail")
        browser.screenshot("console-task")
        person.unfold("Run with other arguments")
        assert person.field("args, a list") == '["ann@exmaple.org", 3]'
        person.write("args, a list", '["ann@example.org", 3]')
        browser.screenshot("console-task-edited")
        person.press("Run as a new task")
        person.reads("runs again as")
        eventually(lambda: [task.result for task in kept.app.history.reruns("mail-1")] == ["'3 to ann@example.org'"])
        person.reads("Run again with other arguments as", "SUCCESS")
        person.press("Queues")
        person.press("Pause", asks=True)
        person.reads("paused")
        assert kept.app.control.pauses.read()[kept.queue].by
        assert person.clicks == 8
        browser.dark(False)
        browser.screenshot("console-queues")

        kept.app.send_task("sample.add", (1, 1))
        eventually(lambda: rabbit.count(kept.queue) == 1)
        person.press("Resume")
        eventually(lambda: rabbit.count(kept.queue) == 0)
        person.press("Dead letters")
        assert buried.id in served.main
        browser.screenshot("console-dead")
        person.press("Back to work", asks=True)
        person.reads("1 message back to work")
        person.press("Workers")
        person.reads("w1@console")
        browser.screenshot("console-workers")
        person.press("Failures")
        assert browser.run("return window.isOwned") is None
        assert HOSTILE in served.main
        person.press("Audit")
        person.reads("rerun", "retry-dead", "pause", "resume")
        served.open("/tasks?state=FAILURE")
        browser.screenshot("console-tasks")


def test_an_open_page_says_when_it_is_not_up_to_date_and_goes_on(served: Served) -> None:
    browser = served.browser

    def trouble() -> str:
        return browser.text(browser.find("#trouble"))

    served.open("/")
    served.process.kill()
    eventually(lambda: "the console does not answer" in trouble(), what=trouble)
    served.process.start()
    eventually(lambda: not trouble(), what=trouble)
    browser.run("htmx.ajax('GET', '/tasks?after=x', {target: 'main', select: 'main', swap: 'outerHTML'})")
    eventually(lambda: "cursor of a task" in trouble(), what=trouble)
    # It is tried again.
    eventually(lambda: not trouble(), what=trouble)


def test_a_tab_that_nobody_sees_keeps_no_connection_and_is_up_to_date_when_it_is_seen(served: Served) -> None:
    def show(is_hidden: bool) -> None:
        served.browser.run(
            f"Object.defineProperty(document, 'hidden', {{value: {str(is_hidden).lower()}, configurable: true}});"
            "document.dispatchEvent(new Event('visibilitychange'));"
        )

    served.open("/tasks")
    served.browser.run("localStorage.setItem('amqtask-live', 'yes')")
    served.open("/tasks")
    served.browser.run(
        "const close = EventSource.prototype.close;"
        "EventSource.prototype.close = function () { window.isClosed = true; close.call(this); };"
    )
    show(is_hidden=True)
    assert served.browser.run("return window.isClosed")
    served.kept.app.send_task("sample.add", (1, 1), countdown=3600)
    eventually(lambda: "PENDING" in served.kept.states().values())
    assert "sample.add" not in served.main
    show(is_hidden=False)
    eventually(lambda: "sample.add" in served.main, what=lambda: served.main)


def test_it_is_read_on_a_telephone_with_a_keyboard_and_by_whoever_sees_little(served: Served) -> None:
    browser: Any = served.browser
    with served.kept.worker("-P", "threads"):
        bad = served.kept.app.send_task("sample.fail", ("x" * 300,))
        served.kept.app.send_task("sample.add", (1, 1), countdown=3600)
        eventually(lambda: served.kept.states().get(bad.id) == "FAILURE", what=lambda: str(served.kept.states()))
        browser.resize(380, 700)
        told = {"{task_id}": bad.id, "{some_id}": bad.id, "{action}": "rerun?state=FAILURE"}
        for page in PAGES:
            path = page
            for place, value in told.items():
                path = path.replace(place, value)
            served.open(path)
            browser.run("for (const one of document.querySelectorAll('details')) one.open = true")
            width = browser.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert width <= 0, f"{path} is {width} pixels too wide"
            assert faults(browser) == [], path
            if path.count("/") == 1:
                browser.screenshot(f"console-phone-{path.removeprefix('/') or 'overview'}", width=380)
    served.open("/tasks")
    browser.run("document.activeElement.blur(); document.dispatchEvent(new KeyboardEvent('keydown', {key: '/'}))")
    browser.run("document.body.dispatchEvent(new KeyboardEvent('keydown', {key: '/', bubbles: true}))")
    assert browser.run("return document.activeElement.name") == "text"
