"""What every consumer does for all: delayed messages go on when they are due, and what dead consumers held goes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from amqtask.transport.redis.layout import Layout
from amqtask.transport.redis.link import Link
from amqtask.transport.redis.resp import ignore_reply
from amqtask.transport.redis.scripts import RELEASE_DUE, SWEEP

if TYPE_CHECKING:
    from amqtask.ground.loop import Timer, TurnLoop

# Messages of one script; seconds between two looks for dead consumers, and at the least between two looks at delayed messages.
MOST_AT_ONCE = 200
SWEEP_SECONDS, SHORTEST_WAIT, LONGEST_WAIT = 5.0, 0.02, 5.0


class Housekeeping:
    """Runs while the consumer's link is open. Redis says when a message is delayed (CLIENT TRACKING), so
    that it asks only when one is due."""

    def __init__(self, link: Link, layout: Layout, loop: TurnLoop, warn: Callable[[str], None]) -> None:
        self._link = link
        self._key = layout.key("amqtask.delay")
        self._loop = loop
        self._warn = warn
        self._due: Timer | None = None
        self._sweep: Timer | None = None
        self._is_asking = self._has_changed = False
        self._has_warned = self._has_looked = False

    def start(self) -> None:
        """A connection is open."""
        self.stop()
        self._is_asking = False
        self._link.send(self._look_at_settings, "INFO", "memory")
        self._look_at_delayed()
        self._look_for_the_dead()

    def _look_at_settings(self, reply: Any) -> None:
        """A Redis that makes room by itself deletes queues."""
        if not isinstance(reply, bytes) or self._has_looked:
            return
        self._has_looked = True
        fields = dict(line.partition(":")[::2] for line in reply.decode(errors="replace").splitlines())
        policy = fields.get("maxmemory_policy", "")
        if policy.startswith("allkeys"):
            self._warn(
                f"Redis at {self._link.server} has maxmemory-policy {policy}: when its memory is full it deletes queues with "
                "their messages. Set noeviction"
            )

    def stop(self) -> None:
        """Look no more."""
        for timer in (self._due, self._sweep):
            if timer is not None:
                timer.cancel()

    def changed(self, keys: list[bytes] | None) -> None:
        """These keys have changed (None: all)."""
        if keys is None or self._key.encode() in keys:
            self._has_changed = True
            self._look_later(SHORTEST_WAIT)

    def _look_later(self, seconds: float) -> None:
        if self._due is not None:
            self._due.cancel()
        self._due = self._loop.call_later(seconds, self._look_at_delayed)

    def _look_at_delayed(self) -> None:
        if not self._link.is_open or self._is_asking:
            return
        self._is_asking, self._has_changed = True, False
        self._link.send(ignore_reply, "CLIENT", "CACHING", "YES")
        self._link.send(ignore_reply, "EXISTS", self._key)
        self._link.run(self._looked, RELEASE_DUE, MOST_AT_ONCE)

    def _looked(self, reply: Any) -> None:
        self._is_asking = False
        if not self._link.is_open:
            return
        if isinstance(reply, Exception):
            self._look_later(1.0)
            return
        left, wait, homeless = reply
        if homeless and not self._has_warned:
            self._has_warned = True
            self._warn(f"{homeless} delayed messages are due, and their exchanges have no queues for them. They wait")
        seconds = LONGEST_WAIT if wait < 0 else min(LONGEST_WAIT, wait / 1000)
        if left == MOST_AT_ONCE or self._has_changed:
            seconds = min(seconds, SHORTEST_WAIT)
        self._look_later(max(seconds, SHORTEST_WAIT if left < MOST_AT_ONCE else 0.0))

    def _look_for_the_dead(self) -> None:
        if self._link.is_open:
            self._link.run(ignore_reply, SWEEP, MOST_AT_ONCE)
            self._sweep = self._loop.call_later(SWEEP_SECONDS, self._look_for_the_dead)
