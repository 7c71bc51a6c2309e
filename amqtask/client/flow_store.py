"""Opens the store of locks and places that `flow_store` names."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from amqtask.exceptions import BackendUnreachable, ConfigurationError, FlowStoreUnreachable
from amqtask.ground.lazy import ByProcess
from amqtask.ground.printable import clause, mask_urls

if TYPE_CHECKING:
    from amqtask.flow.contract import FlowStore
    from amqtask.ground.shapes import Options, SettingValues
    from amqtask.settings import Settings
    from amqtask.transport.broker import Broker

# Seconds for which a server that is away is tried again before slots and callers are told.
PATIENCE = 2.0
_NO_SETTINGS: SettingValues = MappingProxyType({})
NONE = (
    "unique tasks and limits need a store that all callers and workers share: set flow_store to redis://host:6379/0 or "
    "postgresql://host/db (docs/flow-control.md#the-store)"
)


def flow_store_of(conf: Settings, broker: Broker, in_process: Callable[[], FlowStore]) -> FlowStore:
    """What flow_store names, else the broker where that can keep them; `in_process` is what there is for `memory://`.

    Raises: ConfigurationError."""
    url, options, settings = conf.flow_store, conf.flow_store_options, _NO_SETTINGS
    if not url and broker.memory is None:
        from amqtask.transport.redis.urls import tls_settings

        url, options, settings = (
            broker.chords_url,
            conf.broker_transport_options or {},
            tls_settings(conf.broker_use_ssl),
        )
        if url is None:
            raise ConfigurationError(NONE)
    if url and url.partition("://")[0] != "memory":
        return open_flow_store(url, options, conf.broker_connection_timeout, settings)
    return in_process()


def open_flow_store(
    url: str, options: Options, connect_timeout: float, settings: SettingValues = _NO_SETTINGS
) -> FlowStore:
    """The store of a URL; `settings` are those of Redis (`redis_backend_use_ssl`).

    Raises: ConfigurationError for one that there is not, or a library that is missing."""
    from amqtask.transport.redis.urls import SCHEMES

    scheme = url.partition("://")[0]
    is_sql = scheme.partition("+")[0] in ("postgresql", "postgres", "sqlite")
    if not is_sql and scheme not in SCHEMES:
        raise ConfigurationError(
            f"flow_store is {mask_urls(url)!r}; there are redis://, rediss://, sentinel://, redis+cluster://, postgresql://, "
            "sqlite:// and memory://"
        )
    try:
        return (
            _open_sql(url, options, connect_timeout) if is_sql else _open_redis(url, options, connect_timeout, settings)
        )
    except ImportError as error:
        extra = "sqlalchemy" if is_sql else "redis"
        raise ConfigurationError(
            f'flow_store {scheme}:// needs a library that is not installed: pip install "amqtask[{extra}]" ({error})'
        ) from error


def _open_redis(url: str, options: Options, connect_timeout: float, settings: SettingValues) -> FlowStore:
    from amqtask.backends.contract import RetryPolicy
    from amqtask.backends.redis_waiting import RedisServer
    from amqtask.flow.redis import SCRIPTS, RedisStore
    from amqtask.transport.redis.lines import Lines, Question, run_script
    from amqtask.transport.redis.servers import deployment_of

    deployment = deployment_of(url, options, connect_timeout, settings, "flow_store_options")
    policy = RetryPolicy(seconds=PATIENCE)

    def ask_slowly(question: Question) -> Any:
        try:
            return servers.get().retrying(lambda client: run_script(client, question))
        except BackendUnreachable as error:
            raise _away(deployment.name, error.__cause__ or error) from error

    servers = ByProcess(lambda: RedisServer(deployment, policy))
    lines = ByProcess(lambda: Lines(SCRIPTS, ask_slowly, lambda: servers.get().client, connect_timeout))

    def close() -> None:
        for part in (lines.pop(), servers.pop()):
            if part is not None:
                part.close()

    return RedisStore(deployment.name, lines.get, close)


def _open_sql(url: str, options: Options, connect_timeout: float) -> FlowStore:
    from amqtask.backends.contract import RetryPolicy, retrying
    from amqtask.flow.sql import ERRORS, ROWS, SqlStore, cause_of, make_engine, name_of, with_table

    policy = RetryPolicy(seconds=PATIENCE)
    make_engine(url, options, connect_timeout)  # what is wrong with the URL is told at once
    engines = ByProcess(
        lambda: with_table(make_engine(url, options, connect_timeout)), surplus=lambda engine: engine.dispose()
    )
    name = name_of(url)

    def attempt(work: Callable[[Any], Any]) -> Any:
        engine = engines.get()
        try:
            return work(engine)
        except ERRORS as error:
            if ROWS.name in str(cause_of(error)):  # a restored database, or somebody's migration, may be without it
                with_table(engine)
            raise

    def run(work: Callable[[Any], Any]) -> Any:
        return retrying(
            lambda: attempt(work),
            policy,
            errors=ERRORS,
            is_transient=lambda error: True,
            explain=lambda error: _away(name, cause_of(error)),
        )

    def close() -> None:
        engine = engines.pop()
        if engine is not None:
            engine.dispose()

    return SqlStore(name, run, close)


def _away(name: str, error: BaseException) -> FlowStoreUnreachable:
    return FlowStoreUnreachable(
        f"the store of limits at {name} does not answer: {clause(error)}. Is it running there, and is flow_store right?"
    )


__all__ = ["open_flow_store"]
