"""Unique calls that are run again while another call has their key: whoever asks is told which one, and nothing is published."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from amqtask import Unique
from amqtask.beat.operating import Schedules
from amqtask.exceptions import AlreadyQueued
from amqtask.flow.keys import UNIQUE
from amqtask.protocol.message import Message, Properties
from tests.console.test_console import Shown


class Held(Shown):
    """A console of an application with one unique task, of which `first` waits in its queue; `old` of it has failed."""

    def __init__(self, folder: Path, on_conflict: Any = "return") -> None:
        super().__init__(folder)
        self.task: Any = self.app.task(name="shop.count", unique=Unique(by=(), on_conflict=on_conflict))(self.send)
        self.first = str(self.task.delay("first").id)
        self.headers = {**self.sent[self.first], "id": "old"}
        kept = {"body": "W1siYUBiIl0sIHt9LCBudWxsXQ==", "content_type": "application/json", "headers": self.headers}
        self.tell(time.time(), "old", "failed", name="shop.count", exception="KeyError('x')", message=kept)

    @property
    def sent(self) -> dict[str, Any]:
        """Headers of what is in the queue of work, by id."""
        with self.app.broker.admin() as admin:
            headers = [dict(delivery.properties.headers or {}) for delivery in admin.browse("mail", 10)]
        return {one["id"]: one for one in headers}

    @property
    def waiting(self) -> set[str]:
        """Ids of that."""
        return set(self.sent)

    def bury(self) -> None:
        """Put a dead letter of `old` into the dead-letter queue."""
        declare = self.app.queues.declarations(self.app.queues["mail"])
        letter = Message(b'[["a@b"], {}, null]', Properties(headers=self.headers), "", "mail.dead", declare)
        self.app.publisher.publish(letter)

    def dead(self) -> int:
        """How many dead letters there are."""
        with self.app.broker.admin() as admin:
            return admin.count("mail.dead")

    def refused(self, action: str, **fields: str) -> str:
        """Why it is not done."""
        answer = self.client.post(f"/api/do/{action}", json=fields)
        assert answer.status_code == 400, answer.text
        return str(answer.json()["error"])

    def free(self) -> None:
        """The first call has ended."""
        self.app.runtime.flow_store.free(self.headers[UNIQUE], self.first)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Held]:
    made = Held(tmp_path)
    yield made
    made.app.close()


@pytest.mark.parametrize("buries", [False, True])
def test_as_it_was(held: Held, buries: bool) -> None:
    if buries:
        held.bury()

    assert held.first in held.refused("rerun", id="old")
    answer = held.client.post("/api/do/rerun-all", json={"error": "KeyError"}).json()["done"]
    assert (answer.startswith("0 tasks run again; 1 task not"), held.first in answer) == (True, True)
    assert (held.waiting, held.dead()) == ({held.first}, int(buries))

    held.free()
    assert (
        "run again" in held.client.post("/api/do/rerun-all", json={"error": "KeyError", "number": "1"}).json()["done"]
    )
    assert (held.waiting, held.dead()) == ({held.first, "old"}, 0)


@pytest.mark.parametrize("on_conflict", ["return", "drop", "raise"])
def test_as_a_new_task(tmp_path: Path, on_conflict: str) -> None:
    held = Held(tmp_path, on_conflict)

    assert held.first in held.refused("rerun", id="old", args='["b@c"]', kwargs="{}")
    assert held.waiting == {held.first}
    held.app.close()


def test_from_the_page_of_dead_letters(held: Held) -> None:
    held.bury()

    assert held.first in held.refused("retry-dead", queue="mail.dead", id="old")
    assert (held.waiting, held.dead()) == ({held.first}, 1)


def test_a_periodic_task(held: Held) -> None:
    held.app.conf.beat_schedule = {"nightly": {"task": "shop.count", "schedule": 3600.0, "args": ["c@d"]}}

    assert held.first in held.refused("schedule-run", name="nightly")
    assert held.waiting == {held.first}
    held.free()
    sent = Schedules(held.app).run("nightly")
    assert held.waiting == {held.first, sent}
    with pytest.raises(AlreadyQueued, match=sent):
        Schedules(held.app).run("nightly")
