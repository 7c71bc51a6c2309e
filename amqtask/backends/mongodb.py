"""`mongodb://host/database`: results as documents, as Celery writes them (celery/backends/mongodb.py).

The id of a task is the `_id` of its document. A document whose status is SUCCESS is not replaced: the filter leaves it out, and
the insert that the upsert then tries finds its id taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import quote_plus, urlsplit

import bson
import pymongo
from bson.errors import BSONError
from pymongo import errors
from pymongo.uri_parser import parse_uri

from amqtask import states
from amqtask.backends.contract import BackendOptions, Codec, RetryPolicy, unreadable
from amqtask.backends.polling import PatientBackend
from amqtask.exceptions import BackendUnreachable, ConfigurationError, EncodeError, MessageError
from amqtask.ground.lazy import ByProcess
from amqtask.ground.printable import clause
from amqtask.protocol.result import ResultMessage

if TYPE_CHECKING:
    from amqtask.ground.shapes import JsonObject, SettingDict

T = TypeVar("T")
Document = Mapping[str, Any]
# What Celery calls them.
DATABASE, TASKS, GROUPS = "celery", "celery_taskmeta", "celery_groupmeta"
# IndexOptionsConflict, IndexKeySpecsConflict (mongodb/src/mongo/base/error_codes.yml).
_INDEX_IS_THERE = (85, 86)
_ERRORS = (errors.PyMongoError, BSONError, OverflowError)
# The fields that `result_extended` does not add.
_OWN = frozenset({"_id", "status", "result", "traceback", "children", "date_done", "group_id", "parent_id"})


class MongoBackend(PatientBackend):
    """See amqtask.backends.contract.ResultBackend.

    `mongodb_backend_settings`: `database`, `taskmeta_collection`, `groupmeta_collection`; `host`, `port`, `user`,
    `password` where the URL does not say; `options` and all others go to MongoClient. For `transport_options` see
    `PatientBackend` and `PollingBackend`.
    """

    keeps_runs = True
    errors = _ERRORS
    at_once = 1_000

    def __init__(self, options: BackendOptions) -> None:
        super().__init__(options)
        settings = dict(options.settings.get("mongodb_backend_settings") or {})
        self._expires = options.expires
        self._codec = Codec(options)
        self._tasks = settings.pop("taskmeta_collection", TASKS)
        self._groups = settings.pop("groupmeta_collection", GROUPS)
        self._uri, self._database, self._hosts = server_of(options.url, settings)
        milliseconds = int(min(options.connect_timeout, self._patience.seconds or 5.0) * 1000)
        self._arguments: dict[str, Any] = {
            "serverSelectionTimeoutMS": max(1, milliseconds),
            "connectTimeoutMS": max(1, int(options.connect_timeout * 1000)),
            "socketTimeoutMS": max(5_000, int(options.connect_timeout * 1000)),
            "maxPoolSize": settings.pop("max_pool_size", 10),
            **settings.pop("options", {}),
            **settings,
        }
        self._clients = ByProcess(self._connect, surplus=lambda client: client.close())

    # -- the worker's end

    def keep(self, result: ResultMessage, policy: RetryPolicy | None) -> None:
        """Replace or insert a document."""
        document = self._document(result)
        self._run(lambda database: self._write(database, document), policy)

    def _write(self, database: Any, document: Document) -> None:
        query = {"_id": document["_id"], "status": {"$ne": states.SUCCESS}}
        for _ in range(2):
            try:
                database[self._tasks].replace_one(query, document, upsert=True)
                return
            except errors.DuplicateKeyError:
                pass  # SUCCESS, which stays, or somebody inserted it a moment ago

    def _document(self, result: ResultMessage) -> JsonObject:
        document = {
            "_id": result.task_id,
            "status": result.status,
            "result": self._stored(result.result, f"the result of task {result.task_id}"),
            "traceback": self._codec.text(result.traceback),
            "children": result.children,
            # Also for states on the way, so that clean-up finds what never ended.
            "date_done": datetime.now(timezone.utc)
            if result.date_done is None
            else datetime.fromisoformat(result.date_done),
        }
        document |= {name: value for name in ("group_id", "parent_id") if (value := getattr(result, name))}
        return document | {name: self._plain(name, value) for name, value in result.extra.items()}

    def _stored(self, value: object, label: str) -> str | bytes:
        body = self._codec.value(value, label)
        return body.decode() if self._codec.is_text else body

    def _plain(self, name: str, value: object) -> object:
        """A value as BSON has it, so that it can be searched for, else as the serializer writes it."""
        if self._codec.is_private and name in ("args", "kwargs"):
            return self._stored(value, name)
        try:
            bson.encode({name: value})
            return value
        except (BSONError, OverflowError, TypeError, ValueError):
            return self._stored(value, name)

    # -- the caller's end

    def read_some(self, task_ids: Sequence[str]) -> Iterable[ResultMessage]:
        """One query."""
        query = {"_id": {"$in": list(task_ids)}}
        return map(self._result, self._run(lambda database: list(database[self._tasks].find(query))))

    def _result(self, document: Document) -> ResultMessage:
        done = document.get("date_done")
        is_ready = document["status"] in states.READY_STATES
        try:
            return ResultMessage(
                document["_id"],
                document["status"],
                None if document.get("result") is None else self._codec.read(document["result"]),
                self._codec.read_text(document.get("traceback")),
                list(document.get("children") or ()),
                done.isoformat() if is_ready and done is not None else None,
                document.get("group_id"),
                document.get("parent_id"),
                {name: self._value(name, value) for name, value in document.items() if name not in _OWN},
            )
        except MessageError as error:
            return unreadable(document["_id"], error)

    def _value(self, name: str, value: object) -> object:
        if name in ("args", "kwargs") and isinstance(value, (str, bytes)):
            return self._codec.read(value)
        return value

    def forget(self, task_id: str) -> None:
        """Delete the result. Raises: BackendUnreachable."""
        self._run(lambda database: database[self._tasks].delete_one({"_id": task_id}))

    def cleanup(self) -> None:
        """Delete what is older than `result_expires`, tasks and groups. Raises: BackendUnreachable."""
        if not self._expires:
            return
        old = {"date_done": {"$lt": datetime.now(timezone.utc) - timedelta(seconds=self._expires)}}
        for name in (self._tasks, self._groups):
            self._run(lambda database, name=name: database[name].delete_many(old))  # type: ignore[misc]

    def close(self) -> None:
        """Close connections; they open again when they are needed."""
        super().close()
        self._clients.end(lambda client: client.close())

    # -- groups

    def save_group(self, group_id: str, members: Any) -> None:
        """Keep a group's results: their ids for Celery, which restores no more, and all for us.

        Raises: EncodeError, BackendUnreachable."""
        ids = [member[0][0] for member in members[1] or ()]
        document = {
            "_id": group_id,
            "result": self._stored(ids, f"group {group_id}"),
            "members": self._stored(members, f"group {group_id}"),
            "date_done": datetime.now(timezone.utc),
        }
        self._run(lambda database: database[self._groups].replace_one({"_id": group_id}, document, upsert=True))

    def restore_group(self, group_id: str) -> object:
        """What `save_group`, ours or Celery's, kept; None when there is nothing. Raises: BackendUnreachable."""
        document = self._run(lambda database: database[self._groups].find_one({"_id": group_id}))
        if document is None:
            return None
        if document.get("members") is not None:
            return self._codec.read(document["members"])
        return [[group_id, None], [[[task_id, None], None] for task_id in self._codec.read(document["result"])]]

    def delete_group(self, group_id: str) -> None:
        """Delete the group. Raises: BackendUnreachable."""
        self._run(lambda database: database[self._groups].delete_one({"_id": group_id}))

    # -- the server

    def _run(self, work: Callable[[Any], T], policy: RetryPolicy | None = None) -> T:
        return self.retrying(lambda: work(self._clients.get()[self._database]), policy)

    def is_transient(self, error: Exception) -> bool:
        """Whether the server is away."""
        return isinstance(error, errors.ConnectionFailure)

    def explain(self, error: Exception) -> Exception:
        """Our error for one of MongoDB's, with the servers' names."""
        if isinstance(error, (errors.DocumentTooLarge, BSONError, OverflowError)):
            return EncodeError(f"MongoDB at {self._hosts} does not take a result: {error}")
        if isinstance(error, errors.ConnectionFailure):
            return BackendUnreachable(
                f"MongoDB at {self._hosts} does not answer: {clause(error)}. Is it running there, and is result_backend right?"
            )
        return BackendUnreachable(f"MongoDB at {self._hosts} refused: {error}")

    def _connect(self) -> pymongo.MongoClient[JsonObject]:
        client: pymongo.MongoClient[JsonObject] = pymongo.MongoClient(self._uri, tz_aware=True, **self._arguments)
        try:
            for name in (self._tasks, self._groups):
                _index(client[self._database][name])
        except BaseException:  # also when it is interrupted: nobody else knows the client
            client.close()
            raise
        return client


def _index(collection: Any) -> None:
    """Make the index that cleanup needs, with Celery's options, unless there is one with others."""
    try:
        collection.create_index("date_done", background=True)
    except errors.OperationFailure as error:
        if error.code not in _INDEX_IS_THERE:
            raise


class Server(NamedTuple):
    """What to connect to; `hosts` is for logs and errors, without a password."""

    uri: str
    database: str
    hosts: str


def server_of(url: str, settings: SettingDict) -> Server:
    """The server that URL and settings name together; takes the settings that it uses out of `settings`.

    Raises: ConfigurationError."""
    host, port = settings.pop("host", None), settings.pop("port", None)
    user, password = settings.pop("user", None), settings.pop("password", None)
    if host or port:
        url = f"mongodb://{host or 'localhost'}:{port or 27017}"
    elif url.rstrip("/") == "mongodb:":
        url = "mongodb://localhost"
    try:
        # Looks up nothing: the hosts behind mongodb+srv:// are found when the client connects.
        parsed = {"nodelist": [], "database": None} if url.startswith("mongodb+srv:") else parse_uri(url)
    except (errors.InvalidURI, errors.ConfigurationError, ValueError) as error:
        raise ConfigurationError(f"result_backend mongodb://… cannot be read: {error}") from error
    hosts = (
        ", ".join(f"{name}:{number}" for name, number in parsed["nodelist"]) or url.rpartition("@")[2].partition("?")[0]
    )
    if user and "@" not in url:
        scheme, _, after_scheme = url.partition("://")
        url = f"{scheme}://{quote_plus(str(user))}:{quote_plus(str(password or ''))}@{after_scheme}"
    from_url = parsed["database"] or urlsplit(url).path.strip("/")
    return Server(url, settings.pop("database", None) or from_url or DATABASE, hosts)
