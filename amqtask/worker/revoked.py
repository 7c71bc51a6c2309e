"""Revoked task ids, and stamps whose tasks are revoked; the newest 50,000 of each, as in Celery.

A stamp is a header that a caller put on tasks (celery/app/control.py, revoke_by_stamped_headers). Times are Unix time.

By default a revoke is not forgotten at any age: a task with an `eta` waits in the broker for days, and reaches a worker only
then. (Celery's three hours apply only when there are too many, or to those that are sent to other workers.)

The state file (--statedb) keeps them from run to run, also when the worker is killed in between. It is written shortly after a
change, by a short-lived thread: as a new file that replaces the old one, so that a reader finds a complete file. A file that
cannot be read is renamed and kept, with a log line.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from amqtask.exceptions import ConfigurationError
from amqtask.ground.printable import bounded_logger

if TYPE_CHECKING:
    from amqtask.execution.chain_steps import Perhaps
    from amqtask.ground.shapes import Headers, JsonObject

MAX_IDS = 50_000
# Characters of an id or of a stamp's value; messages with longer ones are refused.
LONGEST = 1000
Stamp = tuple[str, Any]
# Headers that name what a task belongs to.
_ABOVE = ("parent_id", "group")
NOTHING: Mapping[str, float] = MappingProxyType({})
# An id or a stamp.
Revoked = TypeVar("Revoked", str, Stamp)


class Revocations:
    """Ids and stamps with the time they were revoked at; falsy while empty, so that the hot path skips it.

    `version` changes with every change that a state file has to save.
    """

    def __init__(self, *, max_ids: int = MAX_IDS, expires: float | None = None, perhaps: Perhaps | None = None) -> None:
        self._max_ids = max_ids
        self._expires = expires
        # For slots that run next steps by themselves: all ids that were ever here.
        self._perhaps = perhaps
        self._ids: OrderedDict[str, float] = OrderedDict()
        self._stamps: OrderedDict[Stamp, float] = OrderedDict()
        # Tasks and groups that are cancelled with all that they lead to.
        self._trees: OrderedDict[str, float] = OrderedDict()
        # What was met of them: it leads to others. Apart, so that it takes no place of what was told.
        self._met: OrderedDict[str, float] = OrderedDict()
        self.version = 0

    def __bool__(self) -> bool:
        return bool(self._ids or self._stamps or self._trees)

    def covers(self, task_id: str, headers: Headers) -> bool:
        """Whether a task with this id and these message headers is revoked."""
        if task_id in self._ids or (self._trees and self.in_tree(task_id, headers)):
            return True
        if not self._stamps or not headers.get("stamped_headers"):
            return False
        return any(stamp in self._stamps for stamp in _stamps_of(headers))

    def in_tree(self, task_id: str, headers: Headers) -> bool:
        """Whether it is cancelled, or belongs to what is: what it leads to does then, too."""
        trees, met = self._trees, self._met
        root = headers.get("root_id")
        if task_id in trees or (isinstance(root, str) and root in trees):
            return True
        for name in _ABOVE:
            above = headers.get(name)
            if isinstance(above, str):
                since = trees.get(above, met.get(above))
                if since is not None:
                    met[task_id] = since
                    return True
        return False

    # -- changes

    def add_trees(self, ids: Iterable[str], now: float) -> None:
        """Revoke these tasks, or groups, and all that belongs to them."""
        self._renew(self._trees, ids, now)

    def add(self, task_ids: Iterable[str], now: float) -> None:
        """Revoke; an id that is revoked already gets the new time."""
        self._renew(self._ids, task_ids, now)

    def add_stamps(self, stamps: Iterable[Stamp], now: float) -> None:
        """Revoke all tasks that carry one of these stamps."""
        self._renew(self._stamps, stamps, now)

    def _renew(self, times: OrderedDict[Revoked, float], keys: Iterable[Revoked], now: float) -> None:
        for key in filter(_is_short, keys):
            times[key] = now
            times.move_to_end(key)
            self._tell(key)
            self.version += 1
        self.purge(now)

    def _tell(self, key: str | Stamp) -> None:
        if self._perhaps is not None and isinstance(key, str):
            self._perhaps.add(key)

    @property
    def must_be_asked(self) -> bool:
        """Whether slots do not know by themselves what may be revoked."""
        return bool(self._stamps) or (bool(self) and self._perhaps is None)

    def purge(self, now: float) -> None:
        """Forget revokes that are too old or too many."""
        limited: tuple[OrderedDict[Any, float], ...] = (self._ids, self._stamps, self._trees, self._met)
        for times in limited:
            while times:
                oldest, since = next(iter(times.items()))
                is_fresh = self._expires is None or now - since < self._expires
                if is_fresh and len(times) <= self._max_ids:
                    break
                del times[oldest]

    # -- for other workers and the state file

    @property
    def ids(self) -> dict[str, float]:
        """Each id with the time of its revoke, oldest first."""
        return dict(self._ids)

    @property
    def stamps(self) -> dict[Stamp, float]:
        """Each stamp with the time of its revoke, oldest first."""
        return dict(self._stamps)

    @property
    def trees(self) -> dict[str, float]:
        """Each task or group that is cancelled with what it leads to, with the time of that, oldest first."""
        return dict(self._trees)

    def merge(
        self,
        ids: Mapping[str, float],
        stamps: Mapping[Stamp, float],
        now: float,
        trees: Mapping[str, float] = NOTHING,
    ) -> None:
        """Take over the revokes of another worker or of a state file; a time in the future counts as now."""
        before = self._count
        self._ids = _merged(self._ids, ids, now)
        self._stamps = _merged(self._stamps, stamps, now)
        self._trees = _merged(self._trees, trees, now)
        for key in (*ids, *trees):
            self._tell(key)
        self.purge(now)
        if self._count != before:
            self.version += 1

    @property
    def _count(self) -> int:
        return len(self._ids) + len(self._stamps) + len(self._trees)


def _merged(
    current: Mapping[Revoked, float], received: Mapping[Revoked, float], now: float
) -> OrderedDict[Revoked, float]:
    merged = {key: min(now, since) for key, since in received.items() if _is_short(key)} | dict(current)
    return OrderedDict(sorted(merged.items(), key=lambda entry: entry[1]))


def _is_short(key: str | Stamp) -> bool:
    parts = (key,) if isinstance(key, str) else key
    return all(len(part) <= LONGEST for part in parts if isinstance(part, str))


def _stamps_of(headers: Headers) -> Iterable[Stamp]:
    """The stamps of a message; each value of a list is one stamp."""
    names, stamps = headers.get("stamped_headers"), headers.get("stamps")
    if not isinstance(names, (list, tuple)) or not isinstance(stamps, Mapping):
        return ()
    return stamps_in({name: stamps[name] for name in names if isinstance(name, str) and name in stamps})


def stamps_in(values: Mapping[str, object]) -> list[Stamp]:
    """The stamps of {stamp: value or list of values}; values that no stamp can have (a mapping, None) are left out."""
    stamps: list[Stamp] = []
    for name, value in values.items():
        listed = value if isinstance(value, (list, tuple, set, frozenset)) else (value,)
        stamps += [(name, stamp_value) for stamp_value in listed if isinstance(stamp_value, (str, int, float))]
    return stamps


logger = bounded_logger("amqtask.worker")


class StateFile:
    """One file and the revokes that it keeps. `save_soon` may be called often; it writes only after a change."""

    def __init__(self, path: str, revoked: Revocations) -> None:
        # What a symbolic link names is replaced, not the link.
        self._path = Path(path).resolve()
        self._revoked = revoked
        self._saved_version = revoked.version
        self._writer: threading.Thread | None = None
        self._is_loaded = False
        self._has_complained = False

    def load(self) -> None:
        """Take over the revokes of the last run. Raises: ConfigurationError when the file could never be written."""
        folder = self._path.parent
        if not os.access(folder, os.W_OK):
            raise ConfigurationError(f"the state file {self._path} cannot be written: is {folder} a folder of yours?")
        if self._path.exists() and not self._path.is_file():  # it would be replaced: /dev/null for the whole machine
            raise ConfigurationError(f"the state file {self._path} is no regular file: name another one, or none")
        self._is_loaded = True
        try:
            state = json.loads(self._path.read_bytes())
            ids = {str(key): float(since) for key, since in state["revoked"].items()}
            stamps = {(str(name), value): float(since) for name, value, since in state.get("revoked_stamps", ())}
            trees = {str(key): float(since) for key, since in state.get("revoked_trees", {}).items()}
        except FileNotFoundError:
            return
        except OSError as error:
            raise ConfigurationError(f"the state file {self._path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._put_aside(error)
            return
        self._revoked.merge(ids, stamps, time.time(), trees)
        self._saved_version = self._revoked.version

    def _put_aside(self, error: Exception) -> None:
        new_path = self._path.with_name(f"{self._path.name}.unreadable-{time.time_ns()}")
        self._path.replace(new_path)
        logger.error(
            "worker: the state file %s is not one of ours (%r): what was revoked before is not known. It is kept as %s",
            self._path,
            error,
            new_path.name,
        )

    def save_soon(self) -> None:
        """Write the file if there was a change, without waiting."""
        if self._revoked.version == self._saved_version or (self._writer is not None and self._writer.is_alive()):
            return
        state = self._take_state()
        self._writer = threading.Thread(target=self._write, args=(state,), name="amqtask-state", daemon=True)
        self._writer.start()

    def save(self) -> None:
        """Write the file and wait until that is done; not if the worker did not even start."""
        if not self._is_loaded:
            return
        if self._writer is not None:
            self._writer.join()
        self._write(self._take_state())

    def _take_state(self) -> JsonObject:
        self._saved_version = self._revoked.version
        stamps = [[name, value, since] for (name, value), since in self._revoked.stamps.items()]
        return {"revoked": self._revoked.ids, "revoked_stamps": stamps, "revoked_trees": self._revoked.trees}

    def _write(self, state: JsonObject) -> None:
        new = self._path.with_name(f"{self._path.name}.new-{os.getpid()}")
        try:
            with new.open("w") as file:
                json.dump(state, file)
                file.flush()
                os.fsync(file.fileno())
            new.replace(self._path)
            self._has_complained = False
        except OSError as error:
            with suppress(OSError):
                new.unlink()
            if not self._has_complained:
                self._has_complained = True
                logger.error("worker: the state file %s cannot be written: %s", self._path, error)
