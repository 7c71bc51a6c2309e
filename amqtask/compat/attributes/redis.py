"""`app.backend` where that is Redis."""

from __future__ import annotations

from typing import Any

from amqtask.backends.redis import RedisBackend


class OfRedis(RedisBackend):
    """Bound to a store."""

    @property
    def client(self) -> Any:
        """redis-py's client, as the store uses it in this process: for locks, counters, health checks."""
        return self._connections.get()[0].client
