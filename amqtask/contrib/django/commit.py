"""Calls that leave when the present transaction is committed (`task.delay_on_commit`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from asgiref.sync import sync_to_async
from django.db import transaction


def after_commit(call: Callable[[], Any]) -> None:
    """Make the call when the transaction is committed, now if there is none, never if it is rolled back."""
    transaction.on_commit(call)


async def aafter_commit(call: Callable[[], Any]) -> None:
    """The same from a coroutine: asked, and called, in the thread that has its connections."""
    await sync_to_async(transaction.on_commit)(call)
