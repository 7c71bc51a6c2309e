"""Delayed tasks, the soonest first: seen by page, sent now, revoked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from amqtask.exceptions import ConfigurationError
from amqtask.ground.printable import count
from amqtask.services.delayed import MOST_COUNTED, MOST_OF_A_QUEUE, Which, look, release

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.ground.shapes import JsonObject

Form = Mapping[str, str]
PAGE_SIZE = 100


def delayed(app: AmqTask, query: Form) -> JsonObject:
    """A page of the delayed tasks that fit."""
    waiting = look(app, _which(query))
    written = query.get("page", "")
    last = max(1, -(-len(waiting.tasks) // PAGE_SIZE))
    page = min(last, max(1, int(written) if written.isascii() and written.isdigit() and len(written) < 9 else 1))
    return {
        "query": {name: query[name] for name in ("id", "task", "queue") if query.get(name)},
        "tasks": [asdict(task) for task in waiting.tasks[(page - 1) * PAGE_SIZE : page * PAGE_SIZE]],
        "number": len(waiting.tasks),
        "total": waiting.total,
        "is_part": waiting.is_part,
        "most": MOST_COUNTED,
        "most_of_a_queue": MOST_OF_A_QUEUE,
        "page": page,
        "pages": last,
    }


def send_now(app: AmqTask, form: Form, user: str) -> str:
    """Send delayed tasks to their queues now: one by its id, those of a task or a queue, or with `all` all of them."""
    return _told(release(app, _meant(form)), "sent now")


def revoke_delayed(app: AmqTask, form: Form, user: str) -> str:
    """Revoke delayed tasks: they go to their queues as expired, where a worker drops them and says so."""
    return _told(release(app, _meant(form), revoked=True), "revoked")


def _told(number: int, what: str) -> str:
    """Where nothing was done, also why that may be."""
    celery = "" if number else "; what a worker of Celery's holds it keeps: revoke that on the task's page"
    return f"{count(number, 'delayed task')} {what}{celery}"


def _which(form: Form) -> Which:
    return Which(*(form.get(name, "").strip() or None for name in ("id", "task", "queue")))


def _meant(form: Form) -> Which:
    which = _which(form)
    if which == Which() and form.get("all") != "yes":
        raise ConfigurationError("say which delayed tasks: id, task, queue, or all=yes")
    return which
