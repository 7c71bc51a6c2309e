"""What the terminal view of `amqtask events` shows: lines of text from a state, and nothing about terminals."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from amqtask import states
from amqtask.ground.printable import printable

if TYPE_CHECKING:
    from amqtask.events.state import State, Task, Worker

# In the order of a task's life; states of one's own follow.
COUNTED = (states.PENDING, states.RECEIVED, states.STARTED, states.RETRY, states.SUCCESS, states.FAILURE,
           states.REVOKED, states.REJECTED)  # fmt: skip
# Seconds over which the rate of events is taken.
RATE_OVER = 5.0
QUIET = "(no task events yet; workers without -E send none: amqtask control enable_events)"


class Screen:
    """`lines(width, height)` is the present picture."""

    def __init__(self, state: State, broker: str, *, clock: Callable[[], float] = time.time) -> None:
        self._state = state
        self._broker = broker
        self._clock = clock
        self._samples: list[tuple[float, int]] = []

    def lines(self, width: int, height: int) -> list[str]:
        """At most `height` lines of at most `width` characters."""
        all_lines = self._state.freeze_while(lambda: list(self._all_lines(height)))
        return [printable(line)[:width] for line in all_lines[:height]]

    def _all_lines(self, height: int) -> Iterator[str]:
        state, now = self._state, self._clock()
        yield (
            f"amqtask events   {self._broker}   {time.strftime('%H:%M:%S', time.localtime(now))}"
            f"   {state.event_count} events, {self._rate(now):.0f}/s   (Ctrl-C ends)"
        )
        yield ""
        workers = sorted(state.workers.values(), key=lambda worker: worker.hostname)
        # Many workers must not push the tasks off the screen.
        room = max(1, height // 3)
        yield f"{'WORKER':<32} {'STATUS':<8} {'ACTIVE':>6} {'PROCESSED':>10}  {'LOAD':<18} HEARD"
        for worker in workers[:room]:
            yield _worker_line(worker, now)
        if len(workers) > room:
            yield f"… and {len(workers) - room} more"
        yield ""
        counts = Counter(task.state for task in state.tasks.values())
        custom_states = sorted(set(counts) - set(COUNTED))
        yield "TASKS  " + "  ".join(f"{name} {counts[name]}" for name in (*COUNTED, *custom_states))
        yield ""
        if not state.tasks:
            yield QUIET
            return
        yield f"{'TIME':<9} {'STATE':<9} {'UUID':<36}  {'TASK':<32} {'WORKER':<24} WHAT"
        for _, task in state.tasks_by_time(limit=height):
            yield _task_line(task)

    def _rate(self, now: float) -> float:
        self._samples.append((now, self._state.event_count))
        while len(self._samples) > 2 and self._samples[0][0] < now - RATE_OVER:
            del self._samples[0]
        (since, before), (_, count) = self._samples[0], self._samples[-1]
        return max(0.0, (count - before) / (now - since)) if now > since else 0.0


def _worker_line(worker: Worker, now: float) -> str:
    loadavg: object = worker.loadavg  # anybody may have told it
    loads = loadavg if isinstance(loadavg, list) else []
    load = " ".join(f"{figure:.2f}" for figure in loads if isinstance(figure, (int, float)))
    heard = f"{max(0.0, now - worker.heartbeats[-1]):.0f} s ago" if worker.heartbeats else "-"
    active, processed = (_or_dash(number) for number in (worker.active, worker.processed))
    return f"{worker.hostname:<32} {worker.status_string:<8} {active:>6} {processed:>10}  {load:<18} {heard}"


def _task_line(task: Task) -> str:
    when = time.strftime("%H:%M:%S", time.localtime(task.timestamp)) if task.timestamp else "-"
    where = task.worker.hostname if task.worker is not None else task.client or "-"
    detail = task.info().get("exception") or task.info().get("result") or task.info().get("args") or ""
    return f"{when:<9} {task.state:<9} {task.uuid:<36}  {task.name or '-':<32} {where:<24} {detail}"


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)
