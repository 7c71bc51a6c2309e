"""Opens the store of locks and places that `flow_store` names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from amqtask.exceptions import BackendUnreachable, ConfigurationError, FlowStoreUnreachable
from amqtask.ground.lazy import ByProcess
from amqtask.ground.printable import clause, mask_urls

if TYPE_CHECKING:
    from amqtask.flow.contract import FlowStore
    from amqtask.ground.shapes import Options

# Seconds for which a server that is away is tried again before slots and callers are told.
PATIENCE = 2.0
NONE = (
    "unique tasks and limits need a store that all callers and workers share: set flow_store to redis://host:6379/0 "
    "(docs/flow-control.md#the-store)"
)


def open_flow_store(url: str, options: Options, connect_timeout: float) -> FlowStore:
    """The store of a URL. Raises: ConfigurationError for one that there is not, or a library that is missing."""
    scheme = url.partition("://")[0]
    if scheme in ("valkey", "valkeys"):
        url = url.replace("valkey", "redis", 1)
        scheme = url.partition("://")[0]
    if scheme not in ("redis", "rediss", "redis+cluster", "rediss+cluster", "sentinel"):
        raise ConfigurationError(
            f"flow_store is {mask_urls(url)!r}; there are redis://, rediss://, sentinel://, redis+cluster:// and memory://"
        )
    try:
        return _open_redis(url, options, connect_timeout)
    except ImportError as error:
        raise ConfigurationError(
            f'flow_store {scheme}:// needs a library that is not installed: pip install "amqtask[redis]" ({error})'
        ) from error


def _open_redis(url: str, options: Options, connect_timeout: float) -> FlowStore:
    from amqtask.backends.contract import RetryPolicy
    from amqtask.backends.redis_waiting import RedisServer
    from amqtask.flow.redis import SCRIPTS, RedisStore
    from amqtask.transport.redis.lines import Lines, run_script
    from amqtask.transport.redis.servers import deployment_of

    deployment = deployment_of(url, options, connect_timeout, options_name="flow_store_options")
    policy = RetryPolicy(seconds=PATIENCE)

    def ask_slowly(question: tuple[str, str, bytes]) -> Any:
        try:
            return servers.get().retrying(lambda client: run_script(client, question))
        except BackendUnreachable as error:
            raise FlowStoreUnreachable(
                f"the store of limits at {deployment.name} does not answer: {clause(error.__cause__ or error)}. Is it running "
                "there, and is flow_store right?"
            ) from error

    servers = ByProcess(lambda: RedisServer(deployment, policy))
    lines = ByProcess(lambda: Lines(SCRIPTS, ask_slowly, lambda: servers.get().client, connect_timeout))

    def close() -> None:
        for part in (lines.pop(), servers.pop()):
            if part is not None:
                part.close()

    return RedisStore(deployment.name, lines.get, close)


__all__ = ["open_flow_store"]
