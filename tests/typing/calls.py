"""Checked by mypy and pyright, not run: what a type checker knows of tasks. An ignored line that is right is an error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from amqtask import AmqTask, current_app, shared_task

if TYPE_CHECKING:
    from amqtask import AsyncResult, Task

app = AmqTask("typed", set_as_current=False)


@app.task
def add(x: int, y: int = 0) -> int:
    """A plain task."""
    return x + y


@app.task
async def fetch(url: str) -> bytes:
    """A coroutine task."""
    return url.encode()


@app.task(bind=True)
def bound(self: Any, name: str) -> str:
    """A bound task: `self` is not an argument of the call."""
    return f"{self.name} {name}"


@app.task(queue="slow")
async def slow(url: str) -> list[int]:
    """A coroutine task with options."""
    return [len(url)]


@shared_task(bind=True)
async def shared(self: Any, url: str) -> int:
    """A bound one that any application may have."""
    return len(url + self.name)


def right() -> None:
    """Everything here is right."""
    result: AsyncResult[int] = add.delay(1, y=2)
    total: int = result.get()
    called: int = add(total)
    page: bytes = fetch.delay("http://a").get()
    text: str = bound.delay("x").get()
    sizes: list[int] = slow.delay("http://a").get()
    size: int = shared.delay("http://a").get()
    del called, page, text, sizes, size


def wrong() -> None:
    """Everything here is an error for the type checker."""
    add.delay("1")  # type: ignore[arg-type]
    add.delay()  # type: ignore[call-arg]
    add.delay(1, z=2)  # type: ignore[call-arg]
    slow.delay(1)  # type: ignore[arg-type]
    shared.delay("http://a", 1)  # type: ignore[call-arg]
    fetch.delay(b"x")  # type: ignore[arg-type]
    bound.delay(1)  # type: ignore[arg-type]
    text: str = add.delay(1).get()  # type: ignore[assignment]
    del text


@app.task(bind=True)
def tells(self: Task[..., Any]) -> str | None:
    """A task's application has what a task needs of it, and the current one is an AmqTask."""
    self.app.control.broadcast("ping")
    self.app.send_task("other").forget()
    made: AmqTask = current_app()
    made.add_periodic_task(1, self.app.signature("other"))
    return self.app.main


async def awaited() -> int:
    """`adelay` is typed the same."""
    result = await add.adelay(1)
    return await result.aget()
