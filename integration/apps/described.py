"""Tasks for programs in other languages; each run is a line in a file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from amqtask import AmqTask

app = AmqTask("described")
app.conf.task_default_queue = os.environ.get("DESCRIBED_QUEUE", "described")
app.conf.task_routes = {"orders.*": {"queue": f"{app.conf.task_default_queue}-orders"}}


class Line(BaseModel):
    sku: str
    count: int = 1


class Order(BaseModel):
    id: int
    lines: list[Line]


def note(*words: Any) -> None:
    with Path(os.environ["DESCRIBED_FILE"]).open("a") as file:
        file.write(f"{json.dumps(words)}\n")


@app.task(name="orders.place", pydantic=True)
def place(order: Order, how: Literal["fast", "slow"] = "fast") -> Order:
    """Place an order."""
    note("place", order.id, [line.sku for line in order.lines], sum(line.count for line in order.lines), how)
    return order


@app.task(name="told")
def told(first: int, /, *others: str, size: tuple[int, int], **more: bool) -> None:
    note("told", first, list(others), size, more)
