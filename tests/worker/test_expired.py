"""Calls whose time is up before a worker comes to them: whoever waits is told, and nothing of them stays behind."""

from __future__ import annotations

import asyncio
import threading
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from amqtask import AmqTask, chord, states
from amqtask.exceptions import TaskRevokedError
from amqtask.testing.worker import start_worker


def test_who_waits_for_a_call_that_expired_behind_others_is_told() -> None:
    app = AmqTask("expiring", broker="memory://", backend="cache+memory://")
    runs, may_end = threading.Event(), threading.Event()
    late: list[str] = []

    @app.task(name="busy")
    def busy() -> None:
        runs.set()
        may_end.wait(60)

    @app.task(name="soon", bind=True)
    def soon(self: Any) -> None:
        late.append(self.request.id)

    with start_worker(app, pool="threads", concurrency=1):
        busy.delay()
        assert runs.wait(60)
        soon_over = datetime.now(timezone.utc) + timedelta(seconds=0.05)
        results = [soon.apply_async(expires=0.05), soon.apply_async(expires=soon_over, ignore_result=False)]
        body = chord([soon.s().set(expires=0.05)], soon.si()).apply_async()
        all_over = datetime.now(timezone.utc) + timedelta(seconds=0.05)
        while datetime.now(timezone.utc) <= all_over:
            runs.wait(0.01)
        may_end.set()
        for result in (*results, body):
            with pytest.raises(TaskRevokedError, match="expired"):
                result.get(timeout=60)
        assert [result.state for result in results] == [states.REVOKED] * 2
    assert late == []
    assert app.memory_broker is not None
    assert app.memory_broker.count(f"{app.conf.task_default_queue}.dead") == 0


def test_the_broker_is_not_asked_to_drop_what_a_worker_tells_of() -> None:
    app = AmqTask("expiring", broker="memory://", task_always_eager=False)

    for options in ({"expires": 5}, {"expires": 5, "ignore_result": True}, {"expires": datetime.now(timezone.utc)}):
        message = app.caller.compose("t", (), {}, options, None)
        assert message.properties.headers["expires"]
        assert message.properties.expiration is None
    assert app.caller.compose("t", (), {}, {"expiration": "5000"}, None).properties.expiration == "5000"


def test_awaiting_a_call_that_expired_ends() -> None:
    app = AmqTask("expiring", broker="memory://", backend="cache+memory://")

    @app.task(name="never")
    def never() -> None:
        raise AssertionError

    async def ask() -> None:
        result = await never.aapply_async(expires=-1)
        with pytest.raises(TaskRevokedError):
            await result.aget(timeout=60)

    with start_worker(app, pool="asyncio", concurrency=1):
        asyncio.run(ask())
