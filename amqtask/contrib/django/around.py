"""What a worker does around each task for Django, as Django does around each request.

Before a task: language and time zone as the settings say, whatever an earlier task in this slot activated; connections that
are broken or older than CONN_MAX_AGE are closed. After it, when its result is stored: the same for connections, a transaction
that it has left open is rolled back, and caches are closed. `async def` tasks use the ORM in a thread of their own each
(asgiref's ThreadSensitiveContext, as an ASGI request does), whose connections end with the task.
A process of the prefork pool begins without its parent's connections: it must neither use them nor say goodbye on
their sockets. Tasks that run inline (task_always_eager, apply) are part of a request, and are left alone.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from asgiref.sync import SyncToAsync, ThreadSensitiveContext, sync_to_async
from django import db
from django.core.cache import caches
from django.db import transaction
from django.utils import timezone, translation

from amqtask import signals
from amqtask.ground.printable import bounded_logger

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

    from amqtask.ground.shapes import CoroutineOf
    from amqtask.outbox.contract import Outbox


logger = bounded_logger("amqtask.django")


# -- This thread's database connections between two pieces of work, and calls that leave when their transaction is committed.


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


def roll_back_what_was_left(task: str, aliases: Collection[str]) -> None:
    """Have no transaction open but those of `aliases`: one that a task has left would take all that later ones write."""
    for connection in db.connections.all(initialized_only=True):
        if connection.in_atomic_block and connection.alias not in aliases:
            logger.error(
                "task %s has left a transaction open on database %r: what it wrote there is rolled back, its result, too, if "
                "that is kept there",
                task, connection.alias,
            )  # fmt: skip
            connection.close()
            # Django's object stays in its transaction when it is closed.
            del db.connections[connection.alias]


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


class AroundTasks:
    """Connected to the signals of one worker, from its construction to `worker_shutdown`."""

    def __init__(self) -> None:
        # The databases of those tasks that began in a transaction: of a test, whose thread shares its connection.
        self._begun_within: dict[str, list[str]] = {}
        self._receivers: tuple[tuple[signals.Signal, Callable[..., None]], ...] = (
            (signals.worker_init, self._close_all),
            (signals.worker_process_init, self._leave_to_the_parent),
            (signals.worker_process_shutdown, self._close_all),
            (signals.task_prerun, self._before),
            (signals.task_postrun, self._after),
            (signals.worker_shutdown, self.stop),
        )
        for signal, receiver in self._receivers:
            signal.connect(receiver, weak=False)

    def stop(self, **_: Any) -> None:
        """Disconnect the signals, and close the connections of this thread."""
        for signal, receiver in self._receivers:
            signal.disconnect(receiver)
        self._close_all()

    async def coroutine(self, running: CoroutineOf[object]) -> Any:
        """Await an `async def` task with a thread of its own for what it calls synchronously."""
        context = ThreadSensitiveContext()
        async with context:
            try:
                return await running
            finally:
                # Without one it never touched a connection.
                thread = SyncToAsync.context_to_thread_executor.get(context)
                if thread is not None:
                    await asyncio.get_running_loop().run_in_executor(thread, db.connections.close_all)

    # -- receivers

    def _before(self, *, task: Any, task_id: str, **_: Any) -> None:
        if task.request.is_eager:
            return
        translation.deactivate()
        timezone.deactivate()
        db.reset_queries()
        close_old_connections()
        within = [each.alias for each in db.connections.all(initialized_only=True) if each.in_atomic_block]
        if within:
            self._begun_within[task_id] = within

    def _after(self, *, task: Any, task_id: str, **_: Any) -> None:
        if task.request.is_eager:
            return
        roll_back_what_was_left(task.name, self._begun_within.pop(task_id, ()))
        close_old_connections()
        caches.close_all()

    def _close_all(self, **_: Any) -> None:
        """Close all connections: before the main process forks, so that there is nothing to inherit, and when a process ends."""
        db.connections.close_all()
        for connection in db.connections.all(initialized_only=True):
            close_pool = getattr(connection, "close_pool", None)
            if close_pool is not None and connection.settings_dict.get("OPTIONS", {}).get("pool"):
                close_pool()
        caches.close_all()

    def _leave_to_the_parent(self, **_: Any) -> None:
        """In a new child: close connections that the parent has opened meanwhile, but not the parent's sessions."""
        for connection in db.connections.all(initialized_only=True):
            if connection.connection is not None:
                _detach(connection.connection)
        self._close_all()


def _detach(connection: BaseDatabaseWrapper) -> None:
    """Detach a connection from its socket: to close it properly would end the parent's session on the server."""
    fileno = getattr(connection, "fileno", None)
    if fileno is None:
        return  # a file (SQLite), or a driver that does not say
    try:
        descriptor = fileno()
    except Exception as error:  # noqa: BLE001 - the driver's own error: it is closed already
        logger.debug("an inherited database connection is closed already: %s", error)
        return
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
