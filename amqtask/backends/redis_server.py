"""A Redis server as one process sees it: connections, subscriptions, bounded retries, and what its errors mean."""

from __future__ import annotations

import ssl
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from amqtask.backends.retrying import RetryPolicy, retrying
from amqtask.exceptions import BackendUnreachable

T = TypeVar("T")
# How long a server may be away before its callers are told, and the pauses between attempts (seconds).
RETRY_FOR, FIRST_PAUSE, LONGEST_PAUSE = 5.0, 0.05, 1.0
# What another attempt may mend.
TRANSIENT = (redis.ConnectionError, redis.TimeoutError)
# A subscription to more channels is not worth undoing: its connection is closed.
REUSED_UP_TO = 50
IDLE_SUBSCRIPTIONS = 10
# Options of result_backend_transport_options that go to the client as they are.
CLIENT_OPTIONS = ("socket_timeout", "socket_connect_timeout", "socket_keepalive", "health_check_interval", "username",
                  "password", "client_name", "max_connections")  # fmt: skip
# Celery writes ssl.CERT_… where redis-py wants a word.
_CERT_REQS = {"CERT_REQUIRED": "required", "CERT_OPTIONAL": "optional", "CERT_NONE": "none"}


def client_url(url: str) -> str:
    """The URL with Celery's spelling of `ssl_cert_reqs` in redis-py's."""
    split = urlsplit(url)
    query = [(name, _CERT_REQS.get(value, value)) for name, value in parse_qsl(split.query)]
    return urlunsplit(split._replace(query=urlencode(query)))


def safe_url(url: str) -> str:
    """Where it is, without user and password."""
    split = urlsplit(url)
    return f"{split.scheme}://{split.hostname or 'localhost'}:{split.port or 6379}{split.path}"


def client_arguments(options: Mapping[str, Any], connect_timeout: float) -> dict[str, Any]:
    """What every connection is made with."""
    return {
        "socket_connect_timeout": connect_timeout,
        "socket_timeout": max(connect_timeout, 5.0),
        "socket_keepalive": True,
        "health_check_interval": 25,
        **{name: options[name] for name in CLIENT_OPTIONS if name in options},
    }


def is_hopeless(error: Exception) -> bool:
    """Whether another attempt would end in the same way."""
    if isinstance(error, redis.AuthenticationError) or not isinstance(error, TRANSIENT):
        return True
    return isinstance(error.__cause__ or error.__context__, ssl.SSLCertVerificationError)


def unreachable(url: str, error: BaseException) -> BackendUnreachable:
    """Our error for a server that does not do what it is asked to."""
    if isinstance(error, redis.AuthenticationError):
        return BackendUnreachable(
            f"Redis at {safe_url(url)} refuses us: {error}. Is the password in result_backend right?"
        )
    if isinstance(error, TRANSIENT):
        return BackendUnreachable(
            f"Redis at {safe_url(url)} does not answer: {error}. Is it running there, and is result_backend right?"
        )
    return BackendUnreachable(f"Redis at {safe_url(url)} refused: {error}")


class Event(NamedTuple):
    """What a subscription says: `value` None means that the server has confirmed the channel, so look at the key now."""

    key: str
    value: bytes | None


class Subscription:
    """Channels over one connection."""

    def __init__(self, client: Any) -> None:
        self._pubsub = client.pubsub()
        self.most = 0

    def add(self, keys: Iterable[str]) -> None:
        """Subscribe; `next` says when the server has confirmed each."""
        names = list(keys)
        self.most = max(self.most, len(names))
        for start in range(0, len(names), 1_000):
            self._pubsub.subscribe(*names[start : start + 1_000])

    def remove(self, *keys: str) -> None:
        """Unsubscribe; without keys from all."""
        self._pubsub.unsubscribe(*keys)

    def next(self, timeout: float) -> Event | None:
        """The next event within so many seconds. Raises: redis.ConnectionError."""
        deadline = time.monotonic() + timeout
        while True:
            found = self._pubsub.get_message(timeout=max(0.0, deadline - time.monotonic()))
            if found is not None and found["type"] in ("message", "subscribe"):
                return Event(found["channel"].decode(), found["data"] if found["type"] == "message" else None)
            if time.monotonic() >= deadline:
                return None

    def close(self) -> None:
        """Close the connection."""
        self._pubsub.close()


class RedisServer:
    """Used by one process only; made anew after a fork."""

    def __init__(self, url: str, arguments: Mapping[str, Any], retry_for: float) -> None:
        self._url = url
        self._patience = RetryPolicy(seconds=retry_for, first_pause=FIRST_PAUSE, longest_pause=LONGEST_PAUSE)
        # The client's own retries would mend a broken subscription behind our back, and what was published
        # meanwhile would be missed.
        self.client: Any = redis.Redis.from_url(client_url(url), retry=Retry(NoBackoff(), 0), **arguments)
        self._idle: deque[Subscription] = deque()

    def retrying(self, work: Callable[[Any], T], policy: RetryPolicy | None = None) -> T:
        """`work(client)`, again while the server is away. Raises: BackendUnreachable when the policy's time is over."""
        return retrying(
            lambda: work(self.client),
            policy or self._patience,
            errors=(redis.RedisError,),
            is_transient=lambda error: not is_hopeless(error),
            explain=lambda error: unreachable(self._url, error),
        )

    def subscription(self) -> Subscription:
        """A subscription to nothing yet; an idle one if there is one."""
        try:
            return self._idle.pop()
        except IndexError:
            return Subscription(self.client)

    def release(self, subscription: Subscription, *, is_sound: bool) -> None:
        """Keep its connection for the next who waits, if it is sound and cheap to clear."""
        if is_sound and subscription.most <= REUSED_UP_TO and len(self._idle) < IDLE_SUBSCRIPTIONS:
            try:
                subscription.remove()
                subscription.most = 0
                self._idle.append(subscription)
                return
            except redis.RedisError:
                pass  # it broke just now: close it
        subscription.close()

    def close(self) -> None:
        """Close what is idle."""
        while self._idle:
            self._idle.pop().close()
        self.client.close()
