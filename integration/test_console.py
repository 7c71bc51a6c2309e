"""The console in a headless Chromium, over a real RabbitMQ with a worker of ours: every page and what can be done there."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from amqtask.console.web import PAGES
from integration.axe import faults
from integration.chromium import Browser, chromium
from integration.conftest import Broker
from integration.machine import free_port
from integration.nodes import NodeError
from integration.test_history import SAMPLE, Kept
from integration.workers import LoggedProcess, eventually

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
        return self.browser.text(self.browser.find("main"))

    def press(self, label: str) -> None:
        """A button with that label; what it asks is answered with yes."""
        self.browser.run("window.confirm = () => true")
        buttons = self.browser.find_all("main button")
        self.browser.follow(next(button for button in buttons if self.browser.text(button) == label))


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


def test_a_failed_task_is_found_read_corrected_and_its_queue_paused(served: Served, rabbit: Broker) -> None:
    kept, browser = served.kept, served.browser
    served.open("/")
    with kept.worker("-P", "threads", "-n", "w1@console"):
        for number in range(40):
            kept.app.send_task("sample.add", (number, 1))
        bad = kept.app.send_task("sample.add", ("ann@exmaple.org", 1))
        kept.app.send_task("sample.fail", (HOSTILE,))
        buried = kept.app.send_task("sample.nobody_knows", (1,))
        kept.succeeded(40)
        eventually(lambda: list(kept.states().values()).count("FAILURE") == 3, what=lambda: str(kept.states()))
        # The page that was open has followed, without a reload.
        eventually(lambda: "sample.add: TypeError" in served.main, what=lambda: served.main)
        browser.screenshot("console-overview")

        served.open("/tasks?state=FAILURE")
        browser.enter(browser.find("input[name=text]"), "exmaple")
        browser.follow(browser.find("form.search button"))
        browser.screenshot("console-tasks")
        browser.follow(browser.find("main tbody a"))
        assert ("TypeError" in served.main, "Traceback" in served.main, bad.id in served.main) == (True, True, True)
        browser.screenshot("console-task")

        browser.click(browser.find("details summary"))
        browser.enter(browser.find("textarea[name=args]"), "[41, 1]")
        served.press("Run as a new task")
        assert "runs again as" in served.main
        eventually(lambda: [task.result for task in kept.app.history.reruns(bad.id)] == ["42"])

        served.open("/failures")
        assert browser.run("return window.isOwned") is None
        assert HOSTILE in served.main
        browser.screenshot("console-failures")
        served.open("/dead")
        served.press("Back to work")
        assert "1 message back to work" in served.main
        assert buried.id
        served.open("/workers")
        assert "w1@console" in served.main
        browser.screenshot("console-workers")

        served.open("/queues")
        served.press("Pause")
        assert "paused" in served.main
        kept.app.send_task("sample.add", (1, 1))
        eventually(lambda: rabbit.count(kept.queue) == 1)
        browser.screenshot("console-queues")
        served.press("Resume")
        eventually(lambda: rabbit.count(kept.queue) == 0)
        served.open("/audit")
        assert all(word in served.main for word in ("rerun", "retry-dead", "pause", "resume"))


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
    served.open("/tasks")
    browser.run("document.activeElement.blur(); document.dispatchEvent(new KeyboardEvent('keydown', {key: '/'}))")
    browser.run("document.body.dispatchEvent(new KeyboardEvent('keydown', {key: '/', bubbles: true}))")
    assert browser.run("return document.activeElement.name") == "text"
