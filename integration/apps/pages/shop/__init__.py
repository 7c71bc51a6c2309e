"""A shop, for the pages that speak of one."""

from __future__ import annotations

from amqtask import AmqTask

app = AmqTask("shop")


@app.task(name="orders.place")
def place(lines: list[str]) -> int:
    """An order."""
    return len(lines)


@app.task(name="orders.cancel")
def cancel(number: int) -> bool:
    """No order."""
    return number > 0
