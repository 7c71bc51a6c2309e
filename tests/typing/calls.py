"""Checked by mypy, not run: what the type checker knows of tasks. An ignored line that is right is an error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from amqtask import AmqTask, current_app

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


def right() -> None:
    """Everything here is right."""
    result: AsyncResult[int] = add.delay(1, y=2)
    total: int = result.get()
    called: int = add(total)
    page: bytes = fetch.delay("http://a").get()
    text: str = bound.delay("x").get()
    del called, page, text


def wrong() -> None:
    """Everything here is an error for the type checker."""
    add.delay("1")  # type: ignore[arg-type]
    add.delay()  # type: ignore[call-arg]
    add.delay(1, z=2)  # type: ignore[call-arg]
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
