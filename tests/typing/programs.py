"""Checked by mypy and pyright, not run: programs as users write them."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from amqtask import (
    AmqTask,
    AsyncResult,
    Concurrency,
    Exchange,
    Queue,
    Rate,
    Task,
    Unique,
    chain,
    chord,
    chunks,
    control_command,
    crontab,
    group,
    shared_task,
    signals,
    signature,
)
from amqtask.exceptions import PublishError, Reject, Retry
from amqtask.testing.worker import start_worker

app = AmqTask("more", broker="memory://", backend="cache+memory://")
app.conf.task_queues = [Queue("a", exchange=Exchange("media", type="topic"), routing_key="a.#")]
app.conf.beat_schedule = {"x": {"task": "add", "schedule": crontab(minute=5), "args": (1, 2)}}
app.conf.update(task_routes={"a.*": {"queue": "a"}})


@app.task(
    bind=True, max_retries=3, limits=[Concurrency(10), Rate("5/m")], unique=Unique(by="x"), autoretry_for=(OSError,)
)
def add(self: Task[..., int], x: int, y: int) -> int:
    if self.request.retries > 2:
        raise Reject("no", requeue=False)
    try:
        return x + y
    except ValueError as error:
        raise self.retry(exc=error, countdown=5) from error


@shared_task
def shared(name: str) -> str:
    return name


@shared_task(bind=True)
def shared_bound(self: Task[..., str], name: str) -> str:
    return f"{self.request.id}{name}"


@app.task(name="x", queue="a")
async def coroutine(x: int) -> list[int]:
    return [x]


@app.on_after_configure.connect
def setup(sender: AmqTask, **_: Any) -> None:
    sender.add_periodic_task(timedelta(seconds=5), add.s(1, 2), name="five")


@signals.task_failure.connect
def failed(sender: Any = None, **kwargs: Any) -> None: ...


@control_command(args=[("n", int)])
def grow(state: Any, n: int = 1) -> dict[str, str]:
    return {"ok": "x"}


def use() -> None:
    one: AsyncResult[int] = add.delay(1, 2)
    two: AsyncResult[int] = add.apply_async((1, 2), countdown=5, queue="a", expires=10)
    number: int = one.get(timeout=5) + two.get()
    three: AsyncResult[str] = shared.delay("x")
    four: AsyncResult[str] = shared_bound.delay("x")
    text: str = three.get() + four.get()
    five: AsyncResult[list[int]] = coroutine.delay(1)
    flow = chain(add.s(1, 2), add.s(3)) | shared.si("x")
    result = flow.delay()
    result.get()
    many = group(add.s(n, n) for n in range(5))()
    values = many.get()
    whole = chord([add.s(1, 2)], shared.s())
    whole.delay().get()
    chunks(add, [(1, 2)], 5).apply_async()
    sig = signature("add", args=(1, 2))
    sig.set(queue="a").delay()
    with app.pipeline() as pipeline:
        add.delay(1, 2)
    print(pipeline.failed, number, text, five, values)
    with start_worker(app, pool="threads", concurrency=2):
        pass
    app.control.revoke(one.id, terminate=True)
    print(app.control.inspect().active(), one.state, one.ready(), one.successful(), one.traceback)
    try:
        app.send_task("x", [1], kwargs={}).forget()
    except (PublishError, Retry):
        pass


async def use_async() -> None:
    result = await add.adelay(1, 2)
    number: int = await result.aget(timeout=5)
    other: int = await result
    sent = await app.asend_task("x", [1])
    print(number, other, sent.id)
    async for state, info in result.astates():
        print(state, info)
