"""Tasks of a small report: fetch pages, count their words, sum them up."""

from __future__ import annotations

from typing import Any

from amqtask import AmqTask, group

app = AmqTask("report", backend="rpc://")
app.conf.task_default_queue = "workflows-example"

PAGES = {"one": "a rose is a rose", "two": "to be or not to be", "three": "amqp"}


@app.task
def fetch(page: str) -> str:
    """The text of a page."""
    return PAGES[page]


@app.task
def count(text: str) -> int:
    """How many words it has."""
    return len(text.split())


@app.task
def total(numbers: list[int]) -> int:
    """Their sum."""
    return sum(numbers)


@app.task
def describe(words: int, unit: str = "words") -> str:
    """For people."""
    return f"{words} {unit}"


@app.task(bind=True)
def report(self: Any, pages: list[str]) -> Any:
    """A task that decides at run time what is to be done in its place."""
    return self.replace(group(fetch.s(page) | count.s() for page in pages) | total.s())


@app.task
def tell(request: Any, error: BaseException, traceback: str) -> None:
    """An errback: it is called in the worker with what failed, and why."""
    print(f"{request.task} failed: {type(error).__name__}")
