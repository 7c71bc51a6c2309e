"""Deadlines: the moment by which a call, its retries and all that follows from it must have ended.

It travels in a header of its own, from which tasks, children and next steps read it, and bounds `expires` too: so every worker,
Celery's as well, looks at it before it starts a task, and a message without a deadline costs nothing.
"""

from __future__ import annotations

import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from amqtask.protocol.task import PUBLISHED_AT, TaskCall, timestamp

if TYPE_CHECKING:
    from amqtask.ground.shapes import HeaderDict, Headers

HEADER = "amqtask-deadline"
# What is published in a task that has a deadline, but is not bound by it: an errback has to run when the time is over.
UNBOUND: HeaderDict = {HEADER: None}
# Seconds: a soft limit of 0 would be none.
SHORTEST = 0.001


def deadline_in(headers: Headers) -> datetime | None:
    """The deadline of a message; None where it has none, or one that cannot be read."""
    value = headers.get(HEADER)
    try:
        return datetime.fromtimestamp(timestamp(value), timezone.utc) if value else None
    except (TypeError, ValueError, AttributeError, ArithmeticError, OSError):
        return None


def bind(call: TaskCall, deadline: datetime) -> None:
    """Have the call end by then, or earlier where that was said before."""
    headers = call.headers or {}
    if HEADER in headers:
        before = deadline_in(headers)
        if before is None:  # UNBOUND
            call.headers = {name: value for name, value in headers.items() if name != HEADER} or None
            return
        deadline = min(deadline, before)
    call.headers = {**headers, HEADER: deadline.isoformat()}
    call.expires = deadline if call.expires is None else min(call.expires, deadline)


def bind_received(headers: HeaderDict, seconds: float) -> None:
    """Give a message its task's deadline, where its sender knew nothing of that: from when it was published, where a header says
    so, else from now; from its `eta`, if it has one. Raises: ValueError, TypeError for an `eta` or `expires` that is no time."""
    published = headers.get(PUBLISHED_AT)
    is_known = isinstance(published, int) and not isinstance(published, bool)
    start = published / 1000 if is_known else time.time()  # type: ignore[operator]
    eta, expires = headers.get("eta"), headers.get("expires")
    if eta:
        start = max(start, timestamp(eta))
    end = start + seconds
    headers[HEADER] = datetime.fromtimestamp(end, timezone.utc).isoformat()
    if not expires or timestamp(expires) > end:
        headers["expires"] = headers[HEADER]


def bound_limit(headers: Headers, soft_limit: float | None, now: float) -> float | None:
    """The soft time limit of a task that starts `now` (Unix time): the seconds that its deadline leaves, if they are fewer."""
    deadline = deadline_in(headers)
    if deadline is None:
        return soft_limit
    remaining = max(SHORTEST, deadline.timestamp() - now)
    return remaining if soft_limit is None else min(soft_limit, remaining)
