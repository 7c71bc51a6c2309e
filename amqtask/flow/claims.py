"""A unique call takes its key before it is published.

It takes it for a short time, and for its `ttl` when the broker has confirmed the call: a caller that dies in between leaves a key
that is free soon. A call that was not published gives it back; if the broker has it nevertheless, and another call has the key
when it is to run, it does not run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from amqtask.exceptions import FlowStoreUnreachable
from amqtask.flow.keys import TAKEN, UNIQUE
from amqtask.ground.printable import bounded_logger

if TYPE_CHECKING:
    from amqtask.exceptions import PublishError
    from amqtask.flow.contract import FlowStore
    from amqtask.flow.keys import FlowPlan
    from amqtask.protocol.message import Message

logger = bounded_logger("amqtask.client")
# Seconds between taking a key and the broker's confirm, at least.
PUBLISHING_SECONDS = 30.0


class Claims:
    """Keys of the calls of one application. `publish_timeout` is seconds. `runs_on_error`: publish without a key when the store
    is away; the worker asks for it then."""

    def __init__(self, store: FlowStore, *, publish_timeout: float | None, runs_on_error: bool) -> None:
        self._store = store
        self._seconds = max(PUBLISHING_SECONDS, 2 * (publish_timeout or 0.0))
        self._runs_on_error = runs_on_error

    def take(self, plan: FlowPlan, message: Message, *, at_once: bool = True) -> str | None:
        """Take the message's key. The id of the call that has it, if another one has. `at_once`: the message is published next.

        Raises: FlowStoreUnreachable."""
        unique = plan.unique
        assert unique is not None
        try:
            return self._take(plan, message, at_once=at_once, replaces=unique.on_conflict == "replace")
        except FlowStoreUnreachable as error:
            if not self._runs_on_error:
                raise
            self._go_without(plan, message, error)
            return None

    def try_to_take(
        self, plan: FlowPlan, message: Message, *, at_once: bool = True, replaces: bool = False
    ) -> str | None:
        """`take` for a call that does not fail by it: while the store is away it has no key, and asks when it is to run."""
        try:
            return self._take(plan, message, at_once=at_once, replaces=replaces)
        except FlowStoreUnreachable as error:
            self._go_without(plan, message, error)
            return None

    def holder(self, plan: FlowPlan, message: Message) -> str | None:
        """The id of another call that has this one's key, which then would not run; None where nobody has it, or can tell."""
        headers = message.properties.headers
        key: Any = headers.get(UNIQUE)
        if not plan.is_key(key):
            return None
        try:
            other = self._store.take(key, headers["id"], self._seconds)
            if other is None:
                self._store.free(key, headers["id"])  # it is taken when the call is to run
        except FlowStoreUnreachable:
            return None
        return other

    def _take(self, plan: FlowPlan, message: Message, *, at_once: bool, replaces: bool) -> str | None:
        unique, headers = plan.unique, message.properties.headers
        assert unique is not None
        seconds = self._seconds if at_once else max(unique.ttl, self._seconds)
        other = self._store.take(headers[UNIQUE], headers["id"], seconds, replaces=replaces)
        if other is None:
            headers[TAKEN] = unique.ttl
        return other

    def _go_without(self, plan: FlowPlan, message: Message, error: FlowStoreUnreachable) -> None:
        task_id = message.properties.headers["id"]
        logger.warning("%s; task %s[%s] is published without its key", error, plan.name, task_id)

    def settled(self, message: Message, error: BaseException | PublishError | None) -> None:
        """The call is published, or is not. Never raises: what the store does not hear ends by itself."""
        headers = message.properties.headers
        try:
            if error is None:
                self._store.confirm(headers[UNIQUE], headers["id"], headers[TAKEN])
            else:
                self._store.free(headers[UNIQUE], headers["id"])
        except FlowStoreUnreachable as away:
            logger.warning("%s; the key of task %s[%s] may be free too soon", away, headers["task"], headers["id"])
