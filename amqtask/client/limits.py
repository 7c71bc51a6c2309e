"""`app.limits`: what tasks' limits are, how far they are used, and other numbers for them, which last until they are reset."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from amqtask.exceptions import ConfigurationError
from amqtask.flow.contract import Override
from amqtask.protocol.flow_options import Concurrency, Rate
from amqtask.remote.pauses import here

if TYPE_CHECKING:
    from amqtask.flow.contract import FlowStore, KeyUse
    from amqtask.flow.keys import FlowPlan
    from amqtask.protocol.flow_options import Limit


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
