"""A Redis server as one process sees it: connections, subscriptions, bounded retries, and what its errors mean."""

from __future__ import annotations

import ssl
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import redis
from redis.exceptions import ClusterDownError, MasterDownError, ReadOnlyError, RedisClusterException, TryAgainError

from amqtask.backends.retrying import RetryPolicy, retrying
from amqtask.exceptions import BackendUnreachable
from amqtask.ground.printable import clause
from amqtask.transport.redis.servers import Deployment

T = TypeVar("T")
# How long a server may be away before its callers are told, and the pauses between attempts (seconds).
RETRY_FOR, FIRST_PAUSE, LONGEST_PAUSE = 5.0, 0.05, 1.0
# All that the library raises; the errors of a cluster as a whole have a tree of their own.
ERRORS = (redis.RedisError, RedisClusterException)
# What another attempt may mend: no connection, a fail-over that is not complete, slots that are on the move.
TRANSIENT = (redis.ConnectionError, redis.TimeoutError, ReadOnlyError, MasterDownError, ClusterDownError, TryAgainError,
             RedisClusterException)  # fmt: skip
# A subscription to more channels is not worth undoing: its connection is closed.
REUSED_UP_TO = 50
IDLE_SUBSCRIPTIONS = 10


def is_hopeless(error: Exception) -> bool:
    """Whether another attempt would end in the same way."""
    if isinstance(error, redis.AuthenticationError) or not isinstance(error, TRANSIENT):
        return True
    return isinstance(error.__cause__ or error.__context__, ssl.SSLCertVerificationError)


def unreachable(name: str, error: BaseException) -> BackendUnreachable:
    """Our error for a server that does not do what it is asked to; `name` is the one that errors show."""
    if isinstance(error, redis.AuthenticationError):
        return BackendUnreachable(
            f"Redis at {name} refuses us: {clause(error)}. Is the password in result_backend right?"
        )
    if isinstance(error, TRANSIENT):
        return BackendUnreachable(
            f"Redis at {name} does not answer: {clause(error)}. Is it running there, and is result_backend right?"
        )
    return BackendUnreachable(f"Redis at {name} refused: {error}")


def or_connection_error(work: Callable[..., T], *args: object, **kwargs: object) -> T:
    """What `work` returns. Raises: redis.ConnectionError, also when another thread has closed the connection meanwhile (redis-py
    trips over what is left of it)."""
    try:
        return work(*args, **kwargs)
    except (ValueError, AttributeError) as error:
        if "closed file" in str(error) or "'NoneType' object" in str(error):
            raise redis.ConnectionError("the connection was closed while it was used") from error
        raise


class Event(NamedTuple):
    """A message of a subscription; `value` None: the server has confirmed the channel, so look at the key now."""

    key: str
    value: bytes | None


class Subscription:
    """Channels over one connection."""

    def __init__(self, client: Any) -> None:
        self._pubsub = client.pubsub()
        self.most_keys = 0

    def add(self, keys: Iterable[str]) -> None:
        """Subscribe; `next` says when the server has confirmed each."""
        names = list(keys)
        self.most_keys = max(self.most_keys, len(names))
        for start in range(0, len(names), 1_000):
            or_connection_error(self._pubsub.subscribe, *names[start : start + 1_000])

    def remove(self, *keys: str) -> None:
        """Unsubscribe; without keys from all."""
        or_connection_error(self._pubsub.unsubscribe, *keys)

    def next(self, timeout: float) -> Event | None:
        """The next event within so many seconds. Raises: redis.ConnectionError."""
        deadline = time.monotonic() + timeout
        while True:
            message = or_connection_error(self._pubsub.get_message, timeout=max(0.0, deadline - time.monotonic()))
            if message is not None and message["type"] in ("message", "subscribe"):
                return Event(message["channel"].decode(), message["data"] if message["type"] == "message" else None)
            if time.monotonic() >= deadline:
                return None

    def close(self) -> None:
        """Close the connection."""
        self._pubsub.close()


class RedisServer:
    """The connections of one process to a deployment; made anew after a fork."""

    def __init__(self, deployment: Deployment, patience: RetryPolicy) -> None:
        self.deployment = deployment
        self._patience = patience
        self._client: Any = None
        self._idle: deque[Subscription] = deque()

    @property
    def client(self) -> Any:
        """Made when it is first used: a cluster's client connects at once."""
        if self._client is None:
            self._client = self.deployment.client()
        return self._client

    def retrying(self, work: Callable[[Any], T], policy: RetryPolicy | None = None) -> T:
        """`work(client)`, again while the server is away. Raises: BackendUnreachable when the policy's time is over."""
        return retrying(
            lambda: or_connection_error(work, self.client),
            policy or self._patience,
            errors=ERRORS,
            is_transient=lambda error: not is_hopeless(error),
            explain=lambda error: unreachable(self.deployment.name, error),
        )

    def subscription(self) -> Subscription:
        """A subscription to nothing yet; an idle one if there is one."""
        try:
            return self._idle.pop()
        except IndexError:
            return Subscription(self.client)

    def release(self, subscription: Subscription, *, is_sound: bool) -> None:
        """Keep a subscription's connection for the next waiter, if it is sound and cheap to clear."""
        if is_sound and subscription.most_keys <= REUSED_UP_TO and len(self._idle) < IDLE_SUBSCRIPTIONS:
            try:
                subscription.remove()
                subscription.most_keys = 0
                self._idle.append(subscription)
                return
            except ERRORS:
                pass  # it broke just now: close it
        subscription.close()

    def close(self) -> None:
        """Close idle connections."""
        while self._idle:
            self._idle.pop().close()
        if self._client is not None:
            self._client.close()
