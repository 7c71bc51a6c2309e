"""Locks and places in a SQL database, for those who have one and no Redis: the rules of flow.memory over as much of the state as
a question needs, in one transaction.

The rows of a task (its scope) are changed by one at a time: by whoever has updated its row with the empty name, until the
transaction ends. Times are the database's.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sa

from amqtask.exceptions import ConfigurationError
from amqtask.flow.contract import MOST_KEYS, REMEMBERED, Override
from amqtask.flow.memory import Held, Line, MemoryStore, Run, State, Switch

if TYPE_CHECKING:
    from amqtask.flow.contract import Circuit, Entry, KeyUse, Verdict
    from amqtask.ground.shapes import OptionDict, Options

T = TypeVar("T")
# How the key of a task's breaker ends.
_BREAKER = ":breaker"
# What the database, or the way to it, may have against a question; somebody may also be making the table just now.
ERRORS = (sa.exc.DBAPIError, sa.exc.TimeoutError)
METADATA = sa.MetaData()
# `until`: when a row may be deleted; None: never.
ROWS = sa.Table(
    "amqtask_flow",
    METADATA,
    sa.Column("scope", sa.String(400), primary_key=True),
    sa.Column("name", sa.String(250), primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
    sa.Column("until", sa.Float(53)),
)
# The database's time, as seconds of Unix time, by dialect.
_CLOCKS = {
    "postgresql": "extract(epoch FROM clock_timestamp())",
    "sqlite": "(julianday('now') - 2440587.5) * 86400.0",
}
# PostgreSQL ends the transaction of a client that stands still while it has a scope (milliseconds).
_PATIENCE = sa.func.set_config("idle_in_transaction_session_timeout", "5000", True)


def make_engine(url: str, options: Options, connect_timeout: float) -> sa.Engine:
    """An engine, which has not connected yet. Raises: ConfigurationError for a URL that cannot be used."""
    try:
        parsed = sa.make_url(url)
        if parsed.drivername in ("postgresql", "postgres"):
            parsed = parsed.set(drivername="postgresql+psycopg")
        defaults: OptionDict = {}
        if parsed.get_backend_name() == "postgresql":
            defaults["connect_args"] = {"connect_timeout": max(1, math.ceil(connect_timeout))}
        return sa.create_engine(parsed, **{**defaults, **options})
    except (sa.exc.ArgumentError, ImportError) as error:
        raise ConfigurationError(f"flow_store cannot be used: {error}") from error


def with_table(engine: sa.Engine) -> sa.Engine:
    """The same, when its database has the table. Raises: ERRORS."""
    METADATA.create_all(engine)
    return engine


def cause_of(error: Exception) -> BaseException:
    """What the driver said of one of ERRORS, without the statement and its values."""
    return getattr(error, "orig", None) or error


def name_of(url: str) -> str:
    """The URL without user and password."""
    parsed = sa.make_url(url)
    return str(sa.URL.create(parsed.drivername, host=parsed.host, port=parsed.port, database=parsed.database))


class SqlStore:
    """See amqtask.flow.contract.FlowStore. `run` calls a function with this process's engine, whose database has the table: it
    tries again while that is away, and raises FlowStoreUnreachable."""

    def __init__(
        self, name: str, run: Callable[[Callable[[sa.Engine], Any]], Any], on_close: Callable[[], None]
    ) -> None:
        self.name = name
        self._run = run
        self._on_close = on_close

    def take(self, key: str, task_id: str, seconds: float, *, replaces: bool = False) -> str | None:
        """See FlowStore."""
        return self._step(*_lock(key), lambda store: store.take(key, task_id, seconds, replaces=replaces))

    def confirm(self, key: str, task_id: str, seconds: float) -> None:
        """See FlowStore."""
        self._step(*_lock(key), lambda store: store.confirm(key, task_id, seconds))

    def free(self, key: str, task_id: str) -> None:
        """See FlowStore."""
        self._step(*_lock(key), lambda store: store.free(key, task_id))

    def enter(self, entry: Entry, lease: float, most: int = 1) -> Verdict:
        """See FlowStore. Always for one run."""
        labels = [f"limit:{bound.label}" for bound in entry.bounds]
        return self._step(entry.scope, [*_names(entry), *labels], lambda store: store.enter(entry, lease))

    def leave(self, entry: Entry, seconds: float, lock: str, ended: str = "", runs: int = 1) -> str:
        """See FlowStore."""
        return self._step(entry.scope, _names(entry), lambda store: store.leave(entry, seconds, lock, ended, runs))

    def circuits(self, keys: Sequence[str]) -> dict[str, Circuit]:
        """See FlowStore."""

        def work(engine: sa.Engine) -> dict[str, Circuit]:
            with engine.connect() as connection:
                moment = float(connection.execute(sa.select(_clock(connection))).scalar_one())
                found: dict[str, Circuit] = {}
                for key in keys:
                    scope = key.removesuffix(_BREAKER)
                    state = _state(scope, _read(connection, scope, [f"switch:{_BREAKER}"]))
                    found |= MemoryStore(lambda: moment, state).circuits([key])
                return found

        circuits: dict[str, Circuit] = self._run(work)
        return circuits

    def renew(self, scope: str, holders: Sequence[str], lease: float) -> None:
        """See FlowStore."""
        names = [f"switch:{_BREAKER}", *map(_run_name, holders)]
        self._step(scope, names, lambda store: store.renew(scope, holders, lease), cleans=True)

    def set_limit(self, scope: str, label: str, override: Override | None) -> bool:
        """See FlowStore."""
        return self._step(scope, [f"limit:{label}"], lambda store: store.set_limit(scope, label, override))

    def look(self, scope: str, labels: Sequence[str]) -> tuple[Mapping[str, Override], Mapping[str, Sequence[KeyUse]]]:
        """See FlowStore."""

        def work(engine: sa.Engine) -> tuple[Mapping[str, Override], Mapping[str, Sequence[KeyUse]]]:
            with engine.connect() as connection:
                rows: dict[str, str] = {}
                for prefix in ("limit:", "line:"):
                    of_scope = sa.select(ROWS.c.name, ROWS.c.value).where(ROWS.c.scope == scope)
                    kept = of_scope.where(ROWS.c.name.startswith(prefix)).order_by(ROWS.c.until.desc()).limit(MOST_KEYS)
                    rows.update((name, value) for name, value in connection.execute(kept))
                moment = float(connection.execute(sa.select(_clock(connection))).scalar_one())
                return MemoryStore(lambda: moment, _state(scope, rows)).look(scope, labels)

        found: tuple[Mapping[str, Override], Mapping[str, Sequence[KeyUse]]] = self._run(work)
        return found

    def close(self) -> None:
        """See FlowStore."""
        self._on_close()

    def _step(self, scope: str, names: Iterable[str], do: Callable[[MemoryStore], T], *, cleans: bool = False) -> T:
        """What `do` makes of the rows with these names, and of those that runs among them have."""
        wanted = list(names)

        def work(engine: sa.Engine) -> T:
            with engine.begin() as connection:
                moment = _begin(connection, scope)
                before = _read(connection, scope, wanted)
                state = _state(scope, before)
                more = {f"line:{key[len(scope) :]}" for run in state.runs.values() for key in run.lines}
                more |= {f"lock:{run.lock[len(scope) :]}" for run in state.runs.values() if run.lock}
                if more := more.difference(wanted):
                    before |= _read(connection, scope, more)
                    state = _state(scope, before)
                answer = do(MemoryStore(lambda: moment, state))
                _write(connection, scope, before, _rows(scope, state, moment))
                if cleans:
                    connection.execute(sa.delete(ROWS).where(ROWS.c.scope == scope, ROWS.c.until < moment))
                return answer

        answer: T = self._run(work)
        return answer


def _clock(connection: sa.Connection) -> sa.ColumnElement[float]:
    return sa.literal_column(_CLOCKS[connection.dialect.name], sa.Float)


def _begin(connection: sa.Connection, scope: str) -> float:
    """Wait until nobody else changes rows of the scope; the time then."""
    told = [_clock(connection), *([_PATIENCE] if connection.dialect.name == "postgresql" else [])]
    mutex = sa.update(ROWS).where(ROWS.c.scope == scope, ROWS.c.name == "").values(value="{}")
    moment = connection.execute(mutex.returning(*told)).scalar()
    if moment is None:
        connection.execute(sa.insert(ROWS).values(scope=scope, name="", value="{}"))
        moment = connection.execute(sa.select(*told)).scalar_one()
    return float(moment)


def _read(connection: sa.Connection, scope: str, names: Iterable[str]) -> dict[str, str]:
    query = sa.select(ROWS.c.name, ROWS.c.value).where(ROWS.c.scope == scope, ROWS.c.name.in_(list(names)))
    return {name: value for name, value in connection.execute(query)}  # noqa: C416 - rows are no pairs for mypy


def _write(
    connection: sa.Connection, scope: str, before: Mapping[str, str], after: Mapping[str, tuple[str, float | None]]
) -> None:
    gone = [name for name in before if name not in after]
    if gone:
        connection.execute(sa.delete(ROWS).where(ROWS.c.scope == scope, ROWS.c.name.in_(gone)))
    for name, (value, until) in after.items():
        if name not in before:
            connection.execute(sa.insert(ROWS).values(scope=scope, name=name, value=value, until=until))
        elif before[name] != value:
            row = sa.update(ROWS).where(ROWS.c.scope == scope, ROWS.c.name == name)
            connection.execute(row.values(value=value, until=until))


def _state(scope: str, rows: Mapping[str, str]) -> State:
    state = State()
    for name, value in rows.items():
        what, _, rest = name.partition(":")
        fields = json.loads(value)
        if what == "lock":
            state.locks[scope + rest] = Held(**fields)
        elif what == "line":
            state.lines[scope + rest] = Line(**fields)
        elif what == "run":
            state.runs[fields["holder"]] = Run(**fields)
        elif what == "limit":
            state.limits[scope, rest] = Override(**fields)
        elif what == "switch":
            state.switches[scope + rest] = Switch(**fields)
    return state


def _rows(scope: str, state: State, moment: float) -> dict[str, tuple[str, float | None]]:
    start = len(scope)
    remembered = moment + REMEMBERED
    rows: dict[str, tuple[str, float | None]] = {}
    for key, lock in state.locks.items():
        rows[f"lock:{key[start:]}"] = json.dumps(asdict(lock)), lock.ends
    for key, line in state.lines.items():
        rows[f"line:{key[start:]}"] = json.dumps(asdict(line)), remembered
    for holder, run in state.runs.items():
        rows[_run_name(holder)] = json.dumps(asdict(run)), remembered
    for key, switch in state.switches.items():
        rows[f"switch:{key[start:]}"] = json.dumps(asdict(switch)), remembered
    for (_, label), override in state.limits.items():
        rows[f"limit:{label}"] = json.dumps(override._asdict()), None
    return rows


def _lock(key: str) -> tuple[str, list[str]]:
    """The scope of a unique key, and the name of its row."""
    scope, _, rest = key.rpartition("}:unique:")
    return f"{scope}}}", [f"lock::unique:{rest}"]


def _names(entry: Entry) -> list[str]:
    start = len(entry.scope)
    locks = [] if entry.lock is None else [f"lock:{entry.lock.key[start:]}"]
    switches = [] if entry.guard is None else [f"switch:{entry.guard.key[start:]}"]
    return [*(f"line:{bound.key[start:]}" for bound in entry.bounds), *locks, *switches, _run_name(entry.holder)]


def _run_name(holder: str) -> str:
    return f"run:{hashlib.sha256(holder.encode()).hexdigest()[:32]}"
