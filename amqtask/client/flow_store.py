"""Opens the store of locks and places that `flow_store` names; and the limits of tasks in it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from amqtask.exceptions import BackendUnreachable, ConfigurationError, FlowStoreUnreachable
from amqtask.flow.contract import Override
from amqtask.ground.lazy import ByProcess
from amqtask.ground.printable import clause, mask_urls
from amqtask.protocol.flow_options import Concurrency, Rate

if TYPE_CHECKING:
    from amqtask.flow.contract import FlowStore, KeyUse
    from amqtask.flow.keys import FlowPlan
    from amqtask.ground.shapes import Options, SettingValues
    from amqtask.protocol.flow_options import Limit
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
        from amqtask.transport.redis import tls_settings

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
    from amqtask.transport.redis import SCHEMES

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
        lines.end(Lines.close)
        servers.end(RedisServer.close)

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

    return SqlStore(name, run, lambda: engines.end(lambda engine: engine.dispose()))


def _away(name: str, error: BaseException) -> FlowStoreUnreachable:
    return FlowStoreUnreachable(
        f"the store of limits at {name} does not answer: {clause(error)}. Is it running there, and is flow_store right?"
    )


# -- `app.limits`: what tasks' limits are, how far they are used, and other numbers for them, which last until they are reset.


# Digits; Python refuses to read thousands of them.
_LONGEST_NUMBER = 100


@dataclass(frozen=True)
class LimitState:
    """One limit of a task. `value` is what holds now (`"10"`, `"500/m, burst 8"`), `in_code` what the task says; they may differ
    where somebody has set it: who (`by`), since when. `running` and `waiting` (about) are over all `keys`, which are those that
    were used within a day, with most of both first. Of a rate nothing counts as running."""

    task: str
    limit: str
    value: str
    in_code: str
    running: int
    waiting: int
    keys: tuple[KeyUse, ...]
    by: str | None = None
    since: datetime | None = None


class Limits:
    """The limits of an application's tasks; `plans` gives what they ask for, by their names, and `store` opens where it is kept.

    All methods raise ConfigurationError where there is no store, and FlowStoreUnreachable."""

    def __init__(self, plans: Callable[[], Mapping[str, FlowPlan]], store: Callable[[], FlowStore]) -> None:
        self._plans = plans
        self._store = store

    def read(self) -> list[LimitState]:
        """All limits of all tasks."""
        return [state for _, plan in sorted(self._plans().items()) for state in self._of(plan)]

    def set(self, task: str, limit: str, value: int | str, *, burst: int | None = None, by: str | None = None) -> None:
        """Have a limit (`"concurrency"`, `"rate by tenant"`) be another number from now on, in all workers, whatever the code
        says: a whole number, or a rate as in `Rate`, with its `burst`. `by`: who wants that; None: user@host.

        Raises: ConfigurationError for a task or limit that there is not, WrongValue for what it cannot be."""
        plan = self._plan(task)
        present = plan.titles.get(limit)
        if present is None:
            raise ConfigurationError(f"task {task} has no limit {limit!r}; it has {', '.join(plan.titles) or 'none'}")
        from amqtask.remote.kept import here

        by, now = by or here(), time.time()
        if isinstance(present, Concurrency):
            if burst is not None:
                raise ConfigurationError(f"{limit} of task {task} is no rate, so it has no burst")
            is_number = isinstance(value, str) and value.isdecimal() and len(value) <= _LONGEST_NUMBER
            places = Concurrency(int(value) if is_number else value).limit  # type: ignore[arg-type]
            override = Override(str(places), by, now, places=places)
        else:
            rate = Rate(str(value), burst=burst)
            override = Override(_in_words(rate), by, now, interval=rate.interval, burst=rate.burst or 1)
        self._store().set_limit(plan.scope, limit, override)

    def reset(self, task: str, limit: str) -> bool:
        """Have a limit be what the code says again, from now on. False: it was. Raises: ConfigurationError for a task that has
        none."""
        return self._store().set_limit(self._plan(task).scope, limit, None)

    def _plan(self, task: str) -> FlowPlan:
        plans = {name: plan for name, plan in self._plans().items() if plan.limits}
        if task not in plans:
            raise ConfigurationError(
                f"there is no task {task!r} with limits; there are {', '.join(sorted(plans)) or 'none'}"
            )
        return plans[task]

    def _of(self, plan: FlowPlan) -> list[LimitState]:
        if not plan.limits:
            return []
        overrides, uses = self._store().look(plan.scope, list(plan.titles))
        states = []
        for title, limit in plan.titles.items():
            override, in_code = overrides.get(title), _in_words(limit)
            keys = sorted(uses.get(title, ()), key=lambda use: use.running + use.waiting, reverse=True)
            states.append(
                LimitState(
                    plan.name,
                    title,
                    in_code if override is None else override.value,
                    in_code,
                    sum(use.running for use in keys),
                    sum(use.waiting for use in keys),
                    tuple(keys),
                    None if override is None else override.by,
                    None if override is None else datetime.fromtimestamp(override.at, timezone.utc),
                )
            )
        return states


def _in_words(limit: Limit) -> str:
    if isinstance(limit, Concurrency):
        return str(limit.limit)
    return f"{limit.rate}, burst {limit.burst}"
