"""Calls that leave when the present transaction is committed (`task.delay_on_commit`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from asgiref.sync import sync_to_async
from django.db import transaction

if TYPE_CHECKING:
    from amqtask.outbox.contract import Outbox


def after_commit(call: Callable[[], object], outbox: Outbox | None = None) -> None:
    """Make the call when the transaction is committed, now if there is none, never if it is rolled back.

    A call in a transaction that the outbox follows is made now: it is a row, which does the same and cannot be lost.
    """
    if outbox is not None and outbox.transaction() is not None:
        call()
    else:
        transaction.on_commit(call)


async def aafter_commit(call: Callable[[], object], outbox: Outbox | None = None) -> None:
    """`after_commit` from a coroutine: looks and calls in the thread that has its connections."""
    await sync_to_async(after_commit)(call, outbox)
