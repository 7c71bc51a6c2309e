"""All strategies of a worker, compiled when it starts."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from amqtask.execution.task_plan import LONGEST_COMPARED
from amqtask.ground.printable import printable
from amqtask.worker.strategy import TaskStrategy

if TYPE_CHECKING:
    from amqtask.execution.contract import TaskLike


class Strategies(dict[str, TaskStrategy]):
    """Task name to strategy; for an unknown name a strategy with the reason (not kept: anybody may send any name)."""

    def __init__(
        self, tasks: Mapping[str, TaskLike], *, hard_limit: float | None = None, soft_limit: float | None = None
    ) -> None:
        super().__init__()
        self._tasks = tasks
        self._hard_limit = hard_limit
        self._soft_limit = soft_limit
        for name, task in tasks.items():
            self._compile(name, task)

    def __missing__(self, name: str) -> TaskStrategy:
        task = self._tasks.get(name)
        if task is not None:  # registered after the worker started
            return self._compile(name, task)
        near = difflib.get_close_matches(name, self._tasks, n=1) if len(name) <= LONGEST_COMPARED else ()
        hint = f" Did the sender mean {near[0]!r}?" if near else ""
        problem = (
            f"no task {printable(name, LONGEST_COMPARED)!r} is registered in this worker.{hint} "
            "Is its module imported (include=, imports, autodiscover_tasks)?"
        )
        return TaskStrategy(name, None, problem=problem)

    def forget(self, name: str) -> None:
        """The task was replaced: compile its strategy anew, and keep its count."""
        old = self.pop(name, None)
        if old is not None and name in self._tasks:
            self._compile(name, self._tasks[name]).count = old.count

    def _compile(self, name: str, task: TaskLike) -> TaskStrategy:
        strategy = TaskStrategy(name, task, hard_limit=self._hard_limit, soft_limit=self._soft_limit)
        self[name] = strategy
        return strategy
