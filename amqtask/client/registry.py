"""The tasks of an app by name; the error for an unknown one lists near names."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from amqtask.exceptions import NotRegistered
from amqtask.ground.plugins import others_names

if TYPE_CHECKING:
    from amqtask.task import RegisteredTask

# What the names of the tasks begin with that every worker has (amqtask.client.builtin_tasks).
BUILT_IN = ("celery.", "amqtask.")


class TaskRegistry(Mapping[str, "RegisteredTask"]):
    """Read it like a dictionary; `register` adds."""

    def __init__(self, complete: Callable[[], None] = lambda: None) -> None:
        """`complete` takes in what is still to come (shared tasks, those that every worker has), when it is first looked for."""
        self._tasks: dict[str, RegisteredTask] = {}
        self._complete = complete

    def __getitem__(self, name: str) -> RegisteredTask:
        try:
            return self._tasks[name]
        except KeyError:
            self._complete()
            if name in self._tasks:
                return self._tasks[name]
            near = difflib.get_close_matches(name, self._tasks, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise NotRegistered(f"no task {name!r} is registered.{hint}") from None

    def __contains__(self, name: object) -> bool:
        if name not in self._tasks:  # without looking for near names
            self._complete()
        return name in self._tasks

    def has(self, name: str) -> bool:
        """Whether a task of that name was registered so far."""
        return name in self._tasks

    def get(self, name: str, default: object = None) -> Any:
        """The task of that name, or the default."""
        return self._tasks[name] if name in self else default

    @property
    def own(self) -> list[str]:
        """The names of the user's tasks, sorted: without those that every worker has."""
        return sorted(name for name in self if not name.startswith(BUILT_IN))

    def __iter__(self) -> Iterator[str]:
        self._complete()
        return iter(self._tasks)

    def __len__(self) -> int:
        self._complete()
        return len(self._tasks)

    def register(self, task: RegisteredTask) -> None:
        """Add a task under its name; it replaces an earlier one of that name."""
        self._tasks[task.name] = task

    def __setitem__(self, name: str, task: RegisteredTask) -> None:
        self._tasks[name] = task

    def unregister(self, name: str) -> None:
        """Take a task out. Raises: NotRegistered."""
        del self._tasks[self[name].name]


__getattr__ = others_names(__name__)
