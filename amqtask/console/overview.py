"""The first page, as plain data: numbers and plots of the last hours, and what is wrong now. The broker is not asked."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING

from amqtask.console.notices import AlertLog, growing_queues
from amqtask.console.pages import as_group
from amqtask.exceptions import ConfigurationError, FlowStoreUnreachable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from amqtask.app import AmqTask
    from amqtask.ground.shapes import JsonObject
    from amqtask.history.client import MinuteNumbers


def overview(app: AmqTask, hours: int = 1) -> JsonObject:
    """Numbers and plots of the last hours (1 to 168); what fires and fails, queues with messages, workers that are gone."""
    since = timedelta(hours=min(168, max(1, hours)))
    # Several for each bar.
    minutes = app.history.minutes(since, every=max(1, since // timedelta(hours=10)))
    succeeded = sum(minute.succeeded for minute in minutes)
    return {
        "hours": hours,
        "sent": sum(minute.sent for minute in minutes),
        "succeeded": succeeded,
        "failed": sum(minute.failed for minute in minutes),
        "retried": sum(minute.retried for minute in minutes),
        "runtime": _mean([(minute.runtime, minute.succeeded) for minute in minutes]),
        "waited": _mean([(minute.waited, minute.started) for minute in minutes]),
        "plot": plot(minutes, since),
        "alerts": sorted(AlertLog(app.history.index).firing().values(), key=lambda alert: -alert["began_at"]),
        "queues": growing_queues(app),
        "breakers": breakers(app),
        "failures": [as_group(group) for group in app.history.failures(since=since, limit=5)],
        "workers": [asdict(worker) for worker in app.history.workers()],
    }


def breakers(app: AmqTask) -> list[JsonObject]:
    """The breakers of tasks that are not closed, and in how many seconds one tries; none while their store is away."""
    guards = {
        plan.guard.key: name
        for name, task in app.tasks.items()
        if (plan := task.flow_plan) is not None and plan.guard is not None
    }
    if not guards:
        return []
    try:
        circuits = app.runtime.flow_store.circuits(list(guards))
    except (FlowStoreUnreachable, ConfigurationError):
        return []
    return [
        {"task": guards[key], "state": circuit.state, "seconds": circuit.seconds}
        for key, circuit in sorted(circuits.items())
    ]


# Bars of a plot.
_BARS = 60


def plot(minutes: list[MinuteNumbers], since: timedelta) -> list[JsonObject]:
    """Bars from the oldest to the newest, each of the same time."""
    now = datetime.now(timezone.utc)
    length = since / _BARS
    within: list[list[MinuteNumbers]] = [[] for _ in range(_BARS)]
    for minute in minutes:
        index = int((minute.at - (now - since)) / length)
        within[min(_BARS - 1, max(0, index))].append(minute)
    return [
        {
            "at": now - since + length * index,
            "succeeded": sum(minute.succeeded for minute in those),
            "failed": sum(minute.failed for minute in those),
            "runtime": _mean([(minute.runtime, minute.succeeded) for minute in those]),
            "waited": _mean([(minute.waited, minute.started) for minute in those]),
        }
        for index, those in enumerate(within)
    ]


def _mean(values: Iterable[tuple[float | None, int]]) -> float | None:
    """The mean of means, each of so many."""
    weighted = [(value, weight) for value, weight in values if value is not None and weight]
    return (
        sum(value * weight for value, weight in weighted) / sum(weight for _, weight in weighted) if weighted else None
    )
