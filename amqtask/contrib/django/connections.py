"""This thread's database connections between two pieces of work, and calls that leave when their transaction is committed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from asgiref.sync import sync_to_async
from django import db
from django.db import transaction

if TYPE_CHECKING:
    from amqtask.outbox.contract import Outbox


def close_old_connections() -> None:
    """Close connections that are broken or older than CONN_MAX_AGE, but none in a transaction (which Django would close)."""
    for connection in db.connections.all(initialized_only=True):
        if not connection.in_atomic_block:
            connection.close_if_unusable_or_obsolete()


def close_broken_connections() -> None:
    """Close connections that had an error and do not answer any more; however old, the others stay."""
    for connection in db.connections.all(initialized_only=True):
        if connection.errors_occurred and not connection.in_atomic_block and not connection.is_usable():
            connection.close()


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
