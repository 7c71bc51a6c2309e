"""Calls that run here and now: `task.apply()` and `task_always_eager`."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from amqtask.canvas import from_dict
from amqtask.execution.inline import InlineExecutor
from amqtask.execution.request import Request
from amqtask.result import EagerResult

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.task import Task


class InlineRunner:
    """One app's: runs a task through the executor, retries and callbacks included."""

    def __init__(self, app: AmqTask) -> None:
        self._app = app

    def run(
        self,
        task: Task[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        options: Mapping[str, Any],
        *,
        propagate: bool = False,
    ) -> EagerResult[Any]:
        """Run a task; with `propagate` (or the option `throw`) its exception is raised here."""
        self._app.finalize()
        task_id = options.get("task_id") or str(uuid.uuid4())
        propagate = bool(options.get("throw", propagate))
        embed = {"callbacks": _as_list(options.get("link")), "errbacks": _as_list(options.get("link_error"))}
        embed["chain"] = options.get("chain")
        retries = int(options.get("retries") or 0)
        while True:
            executor = InlineExecutor(self._app.tasks, run_next=self._run_next, hostname=socket.gethostname())
            headers = {
                "task": task.name,
                "id": task_id,
                "retries": retries,
                "ignore_result": False,
                **(options.get("headers") or {}),
            }
            request = Request(
                number=0,
                id=task_id,
                task=task.name,
                headers=headers,
                decoded=(tuple(args), dict(kwargs), embed),
                is_eager=True,
            )
            outcome = executor.execute(request)
            if executor.retry is None:
                break
            again = executor.retry.sig or {}
            args = args if again.get("args") is None else again["args"]
            kwargs = kwargs if again.get("kwargs") is None else again["kwargs"]
            retries += 1
        return self._eager_result(executor, outcome, task_id, task.name, propagate)

    def _eager_result(
        self, executor: InlineExecutor, outcome: Any, task_id: str, name: str, propagate: bool
    ) -> EagerResult[Any]:
        if executor.error is not None and propagate:
            raise executor.error
        kept = executor.kept
        value = executor.error if executor.error is not None else (kept.result if kept is not None else None)
        result: EagerResult[Any] = EagerResult(task_id, value, outcome.state, outcome.traceback or None, name)
        if kept is not None and self._app.conf.task_store_eager_result and self._app.backend is not None:
            self._app.backend.store(kept)
        return result

    def _run_next(self, found: Mapping[str, Any], result: Any, rest: list[Any]) -> None:
        call = from_dict(found, self._app)
        args = call.args if call.immutable else (result, *call.args)
        self.run(self._app.tasks[call.task], args, call.kwargs, {**call.options, "chain": rest})


def _as_list(found: Any) -> list[Any] | None:
    if not found:
        return None
    return list(found) if isinstance(found, (list, tuple)) else [found]
