"""State: a picture of workers and tasks from events, whatever order and shape they come in."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amqtask.events.state import State


class Feed:
    """A state, and events that come to it in order."""

    def __init__(self, **options: Any) -> None:
        self.state = State(**options)
        self.clock = 0

    def tell(self, kind: str, hostname: str = "w@h", **fields: Any) -> Any:
        self.clock += 1
        now = time.time()
        event = {"type": kind, "hostname": hostname, "clock": self.clock, "timestamp": now, "local_received": now}
        return self.state.event({**event, "pid": 7, **fields})


def test_a_task_is_followed_to_its_end() -> None:
    feed = Feed()
    feed.tell("task-sent", "gen1@h", uuid="a", name="t", queue="q", exchange="", routing_key="q")
    feed.tell("task-received", uuid="a", name="t", args="(1,)", kwargs="{}", retries=0)
    feed.tell("task-started", uuid="a")
    task = feed.state.tasks["a"]
    assert (task.state, task.ready) == ("STARTED", False)

    feed.tell("task-succeeded", uuid="a", result="3", runtime=0.1)

    assert (task.state, task.ready, task.result, task.runtime) == ("SUCCESS", True, "3", 0.1)
    assert (task.name, task.args, task.routing_key, task.client) == ("t", "(1,)", "q", "gen1@h")
    assert task.sent <= task.received <= task.started <= task.succeeded
    assert task.worker is feed.state.workers["w@h"]
    assert task.origin == "w@h.7"
    assert (feed.state.event_count, feed.state.task_count) == (4, 1)
    assert task.info() == {
        "args": "(1,)",
        "kwargs": "{}",
        "retries": 0,
        "result": "3",
        "runtime": 0.1,
        "exchange": "",
        "routing_key": "q",
    }
    assert task.as_dict()["state"] == "SUCCESS"


def test_late_events_fill_gaps_and_turn_nothing_back() -> None:
    feed = Feed()
    feed.tell("task-succeeded", uuid="a", result="3")
    feed.tell("task-received", uuid="a", name="t", args="()", result="other")
    feed.tell("task-started", uuid="a")
    feed.tell("task-sent", "gen1@h", uuid="a", routing_key="q")

    task = feed.state.tasks["a"]
    assert (task.state, task.name, task.result, task.routing_key, task.clock) == ("SUCCESS", "t", "3", "q", 1)
    assert task.received is not None


def test_a_retry_begins_anew() -> None:
    feed = Feed()
    feed.tell("task-started", uuid="a")
    feed.tell("task-retried", uuid="a", exception="ValueError()")
    assert feed.state.tasks["a"].state == "RETRY"

    feed.tell("task-received", uuid="a", name="t", retries=1)

    assert feed.state.tasks["a"].state == "RECEIVED"
    assert feed.state.tasks["a"].retries == 1


def test_own_events_are_own_states() -> None:
    feed = Feed()
    feed.tell("task-started", uuid="a")
    feed.tell("task-progress", uuid="a", percent=50)

    assert (feed.state.tasks["a"].state, feed.state.tasks["a"].percent) == ("PROGRESS", 50)


def test_workers_come_live_and_go() -> None:
    came: list[str] = []
    went: list[str] = []
    feed = Feed(
        on_node_join=lambda worker: came.append(worker.hostname),
        on_node_leave=lambda worker: went.append(worker.hostname),
    )
    (worker, created), subject = feed.tell("worker-online", freq=2.0, active=1, sw_ident="py-amqtask")
    assert (created, subject) == (True, "online")
    feed.tell("worker-heartbeat", freq=2.0, active=3, processed=9)

    assert (worker.alive, worker.status_string, worker.active, worker.processed) == (True, "ONLINE", 3, 9)
    assert list(feed.state.alive_workers()) == [worker]
    feed.tell("worker-offline", freq=2.0)
    assert (came, went) == (["w@h"], ["w@h"])
    assert "w@h" not in feed.state.workers
    assert not worker.alive


def test_a_worker_that_is_silent_for_two_heartbeats_is_gone() -> None:
    feed = Feed()
    long_ago = time.time() - 5.0
    feed.tell("worker-heartbeat", freq=2.0, timestamp=long_ago, local_received=long_ago)

    worker = feed.state.workers["w@h"]
    assert worker.heartbeat_expires == pytest.approx(long_ago + 4.0)
    assert not worker.alive


def test_clocks_that_differ_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    feed = Feed()
    for _ in range(3):
        feed.tell("worker-heartbeat", freq=2.0, timestamp=time.time() - 100)

    assert caplog.text.count("w@h are 100 s away") == 1


def test_tasks_are_found_by_type_and_worker_the_latest_first() -> None:
    feed = Feed()
    for number, (name, worker) in enumerate([("t", "a@h"), ("u", "b@h"), ("t", "b@h")]):
        feed.tell("task-received", worker, uuid=str(number), name=name)
    state = feed.state

    assert {task.uuid for task in state.tasks_by_type["t"]} == {"0", "2"}
    assert [uuid for uuid, _ in state.tasks_by_type("t")] == ["2", "0"]
    assert [uuid for uuid, _ in state.tasks_by_worker("b@h", limit=1)] == ["2"]
    assert [uuid for uuid, _ in state.tasks_by_time(limit=2)] == ["2", "1"]
    assert [uuid for uuid, _ in state.tasks_by_timestamp(reverse=False)] == ["0", "1", "2"]
    assert state.task_types() == ["t", "u"]
    assert state.tasks_by_type["unknown"] == set()


def test_a_task_belongs_to_the_worker_that_had_it_last() -> None:
    feed = Feed()
    feed.tell("task-received", "a@h", uuid="1", name="t")
    feed.tell("task-received", "b@h", uuid="1", name="t")

    assert list(feed.state.tasks_by_worker) == ["b@h"]


def test_parents_and_children_find_each_other_in_any_order() -> None:
    feed = Feed()
    feed.tell("task-received", uuid="child", name="t", parent_id="parent", root_id="parent")
    feed.tell("task-received", uuid="parent", name="t")
    feed.tell("task-received", uuid="second", name="t", parent_id="parent")

    tasks = feed.state.tasks
    assert tasks["child"].parent is tasks["child"].root is tasks["parent"]
    assert {task.uuid for task in tasks["parent"].children} == {"child", "second"}


def test_the_oldest_tasks_are_forgotten_everywhere() -> None:
    feed = Feed(max_tasks_in_memory=2)
    for number in range(4):
        feed.tell("task-received", uuid=str(number), name=f"t{number}")

    assert list(feed.state.tasks) == ["2", "3"]
    assert list(feed.state.tasks_by_type) == ["t2", "t3"]
    assert {task.uuid for task in feed.state.tasks_by_worker["w@h"]} == {"2", "3"}


def test_clearing_keeps_what_has_not_ended() -> None:
    feed = Feed()
    feed.tell("task-started", uuid="runs")
    feed.tell("task-succeeded", uuid="done")

    seen = feed.state.freeze_while(lambda: len(feed.state.tasks), clear_after=True)

    assert seen == 2
    assert list(feed.state.tasks) == ["runs"]
    assert (feed.state.event_count, feed.state.workers) == (0, {})
    feed.state.clear_tasks(ready=False)
    assert feed.state.tasks == {}


def test_other_groups_go_to_their_handlers() -> None:
    feed = Feed()
    feed.state.handlers["custom"] = lambda subject, event: event["what"]

    assert feed.tell("custom-thing", what=1) == (1, "thing")
    assert feed.tell("unknown-thing") is None


_JUNK = st.sampled_from([None, True, 7, -1.5, float("nan"), "x", [1], {"a": 1}])
_NAMES = ["uuid", "hostname", "name", "parent_id", "root_id", "clock", "freq", "timestamp", "local_received", "heartbeats",
          "children", "worker", "state", "event", "alive", "__class__", "cluster_state", "pid", "id"]  # fmt: skip


@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                ["task-sent", "task-received", "task-succeeded", "worker-online", "worker-offline", "-", ""]
            ),
            st.dictionaries(st.sampled_from(_NAMES), _JUNK),
        ),
        max_size=8,
    )
)
def test_no_event_of_a_stranger_breaks_it(told: list[tuple[str, dict[str, Any]]]) -> None:
    state = State()
    for kind, fields in told:
        state.event({"hostname": "h", "uuid": "u", **fields, "type": kind})

    assert state.event_count == len(told)
    list(state.tasks_by_time())
    list(state.alive_workers())
    assert all(task.as_dict() and task.info() is not None and repr(task) for task in state.tasks.values())
