"""What an outbox is to its application and to its relay; amqtask.contrib.sqlalchemy and amqtask.contrib.django keep it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import NamedTuple, Protocol, TypeAlias, cast

from amqtask.exceptions import ConfigurationError, OperationalError
from amqtask.ground.plugins import load_path, plugins


class OutboxUnreachable(OperationalError):
    """The outbox's database could not do what it was asked to."""


class NewRow(NamedTuple):
    """One message to be written; `message` and `body` are what `amqtask.outbox.rows` makes of it."""

    task_id: str
    task: str
    message: str
    body: bytes


class StoredRow(NamedTuple):
    """One row that waits; `attempts` is how often publishing it has failed."""

    id: int
    message: str
    body: bytes
    attempts: int


class FailedRow(NamedTuple):
    """A row that stays: why, after how many attempts, and when to try it again."""

    id: int
    error: str
    attempts: int
    retry_at: datetime


class Verdict(NamedTuple):
    """The outcome of a batch. Rows that are in neither list stay as they were."""

    sent: Sequence[int] = ()
    failed: Sequence[FailedRow] = ()


class Waiting(NamedTuple):
    """What waits in an outbox: how much, since when, and how much of it has failed before."""

    rows: int
    oldest: datetime | None
    failing: int


class Failing(NamedTuple):
    """A row that could not be published, for the operator."""

    id: int
    task_id: str
    task: str
    attempts: int
    error: str
    created_at: datetime


Send: TypeAlias = Callable[[Sequence[StoredRow]], Verdict]


class Transaction(Protocol):
    """An open transaction that calls are written in."""

    def write(self, rows: Sequence[NewRow]) -> None:
        """Insert rows, in order. Raises what the database raises: the transaction is the caller's."""

    async def awrite(self, rows: Sequence[NewRow]) -> None:
        """`write` from a coroutine."""


class Store(Protocol):
    """The rows as a relay sees them. All methods may raise OutboxUnreachable; all times are aware and UTC."""

    @property
    def name(self) -> str:
        """Table and database, for logs and reports; without a password."""

    def relay(self, limit: int, now: datetime, send: Send) -> int:
        """Give the first `limit` rows that are due (by id) to `send`, delete what it has sent, note what failed, and
        commit; how many rows there were.

        Where the database can, the rows are locked meanwhile and rows that another relay has locked are passed over. When
        `send` raises, or the process dies, all of them stay.
        """

    def waiting(self) -> Waiting: ...

    def failing(self, limit: int) -> Sequence[Failing]: ...

    def retry_now(self) -> int:
        """Make all rows that have failed due at once; how many."""

    def close(self) -> None:
        """Close connections; they open again when the store is used again."""


class Outbox(Protocol):
    """What `app.outbox` is."""

    def transaction(self) -> Transaction | None:
        """The transaction that is open here (in this thread, task or greenlet); None: calls are published at once."""

    def store(self) -> Store:
        """The store that a relay reads."""


def find_outbox(setting: object, database: str) -> Outbox:
    """True: Django's; `module:name`: that object. Raises: ConfigurationError."""
    if setting is True or setting in ("django", "True", "true", "1"):
        django: Outbox = plugins().django_outbox(database)
        return django
    if not isinstance(setting, str):
        return cast("Outbox", setting)
    try:
        outbox = load_path(setting) if setting.partition(":")[2] else None
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"outbox = {setting!r}: {error}") from error
    if not hasattr(outbox, "transaction"):
        raise ConfigurationError(
            f"outbox = {setting!r} names no outbox: True is Django's, 'proj.db:outbox' an object in a module of yours"
        )
    return cast("Outbox", outbox)
