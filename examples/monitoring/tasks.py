"""A shop that ships orders, and logs what it does."""

from __future__ import annotations

from amqtask import AmqTask
from amqtask.log import get_task_logger

# Messages say when they were published: the histogram of queue waits needs it.
app = AmqTask("shop", backend="rpc://", task_send_timestamp=True, task_default_queue="monitoring-example")
logger = get_task_logger(__name__)


@app.task(name="shop.ship")
def ship(order: int) -> str:
    """Ship an order; nobody knows the thirteenth."""
    logger.info("order %d leaves", order)
    if order == 13:
        raise LookupError(f"no order {order}")
    print("packed order", order)
    return f"order {order} is on its way"
