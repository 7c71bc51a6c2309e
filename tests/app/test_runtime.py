"""What an application is made of follows its settings; what is in the broker and in stores stays."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
from typing import Any

import pytest

from amqtask import AmqTask


@pytest.fixture
def app() -> AmqTask:
    app = AmqTask("shop", broker="memory://", backend="cache+memory://", set_as_current=False)

    @app.task(name="add")
    def add(x: int, y: int) -> int:
        return x + y

    return app


def waiting(app: AmqTask, queue: str) -> int:
    assert app.memory_broker is not None
    return app.memory_broker.count(queue)


def test_a_changed_setting_takes_effect_at_the_next_call(app: AmqTask) -> None:
    app.send_task("add", (1, 2))
    app.conf.task_default_queue = "other"
    app.send_task("add", (1, 2))

    assert (waiting(app, "amqtask"), waiting(app, "other")) == (1, 1)


def test_a_changed_setting_that_does_not_concern_the_result_store_leaves_it(app: AmqTask) -> None:
    store = app.backend
    app.conf.task_default_queue = "other"
    assert app.backend is store

    app.conf.result_serializer = "msgpack"
    assert app.backend is not store


def test_calls_become_eager_and_not_eager_with_the_setting(app: AmqTask) -> None:
    app.conf.task_always_eager = True
    assert app.send_task("add", (1, 2)).get() == 3

    app.conf.task_always_eager = False
    app.send_task("add", (1, 2))
    assert waiting(app, "amqtask") == 1


def test_what_is_put_in_place_of_a_part_is_used_by_calls(app: AmqTask) -> None:
    app.backend = None

    assert app.send_task("add", (1, 2)).backend is None


def test_a_subclass_may_do_something_of_its_own_around_a_call() -> None:
    class Noting(AmqTask):
        names: list[str]

        def send_task(self, name: str, *args: Any, **options: Any) -> Any:
            self.names = [name]
            return super().send_task(name, *args, **options)

    app = Noting("shop", broker="memory://", set_as_current=False)
    app.send_task("add", (1, 2), queue="own")

    assert app.names == ["add"]
    assert waiting(app, "own") == 1


def test_a_cleared_broker_is_forgotten_by_publishers_of_event_loops_too(app: AmqTask) -> None:
    async def call() -> None:
        await app.asend_task("add", (1, 2))

    asyncio.run(call())
    app.clear_memory()
    asyncio.run(call())

    assert waiting(app, "amqtask") == 1


LATE = """
    import sys, types
    from amqtask import AmqTask
    from amqtask.exceptions import PublishError

    app = AmqTask("late", broker="memory://", backend=None if sys.argv[1] == "-" else sys.argv[1])
    call = app.send_task

    class Last:
        def __del__(self, call=call, print=print, PublishError=PublishError):
            try:
                call("t")
            except PublishError as error:
                print(error)

    # Goes when modules go.
    sys.modules["last"] = types.ModuleType("last")
    sys.modules["last"].last = Last()
"""


@pytest.mark.parametrize("results", ["-", "rpc://", "cache+memory://"])
def test_a_first_call_of_a_finalizer_when_python_shuts_down_says_so(results: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LATE), results], capture_output=True, text=True, timeout=60, check=False
    )

    assert done.stdout.startswith("Python is shutting down, and this process has not published before"), done.stderr
