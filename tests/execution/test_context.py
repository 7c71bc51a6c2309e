"""`task.request`: Celery's fields, looked up when they are asked for."""

from __future__ import annotations

from typing import Any

import pytest

from amqtask.execution.context import Context
from amqtask.testing.tasks import request

CELERYS = (
    "args", "callbacks", "called_directly", "chain", "chord", "correlation_id", "delivery_info", "errbacks", "eta",
    "expires", "group", "group_index", "headers", "hostname", "id", "ignore_result", "is_eager", "kwargs", "logfile",
    "loglevel", "origin", "parent_id", "properties", "retries", "reply_to", "replaced_task_nesting", "root_id", "shadow",
    "stamped_headers", "stamps", "taskset", "timelimit", "time_limit", "soft_time_limit", "utc", "children",
)  # fmt: skip


def context(**headers: Any) -> Context:
    running = request(1, "t", headers=headers, reply_to="replies", routing_key="q", soft_limit=3.0)
    return Context.of(running, [1], {"k": 2}, {"callbacks": [{"task": "next"}]}, "w@h")


@pytest.mark.parametrize("name", CELERYS)
def test_every_field_of_celerys_is_there_while_a_task_runs_and_while_none_does(name: str) -> None:
    assert hasattr(context(), name)
    assert hasattr(Context(), name)


def test_fields_come_from_the_message() -> None:
    running = context(group="g", root_id="r", retries=2)

    assert (running.id, running.args, running.kwargs) == ("id-1", [1], {"k": 2})
    assert (running.group, running.root_id, running.retries, running.reply_to) == ("g", "r", 2, "replies")
    assert running.timelimit == [None, 3.0]
    assert (running.soft_time_limit, running.callbacks) == (3.0, [{"task": "next"}])
    assert running.delivery_info["routing_key"] == "q"
    assert (running.called_directly, Context().called_directly) == (False, True)


def test_the_callers_own_headers_are_fields_too() -> None:
    assert context(tenant="acme").tenant == "acme"
    with pytest.raises(AttributeError, match="tenant"):
        context().tenant  # noqa: B018 - the access is the test


def test_anything_may_be_set_on_it() -> None:
    running = context()
    running.update(tenant="acme")
    running.step = 3

    assert (running.get("tenant"), running.step, running.get("missing", "default")) == ("acme", 3, "default")


def test_children_are_kept() -> None:
    running = context()
    running.children.append("child")

    assert running.children == ["child"]


def test_the_headers_are_those_that_the_caller_gave() -> None:
    running = context(tenant="acme", retries=1, compression=None, **{"x-death": [1], "amqtask-run": "r"})
    running.headers["more"] = 1

    assert running.headers == {"tenant": "acme", "more": 1}
    assert context().headers == {}
    assert Context().headers is None


def test_headers_that_a_library_writes_twice_are_there_once() -> None:
    assert context(trace="t", headers={"trace": "t", "tenant": "acme"}).headers == {"trace": "t", "tenant": "acme"}
