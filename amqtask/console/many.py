"""What is done to all tasks that a search has, after a page that says how many they are; failures that were seen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import TYPE_CHECKING

from amqtask.console.pages import asked
from amqtask.exceptions import ConfigurationError
from amqtask.ground.printable import count
from amqtask.services.rerunning import run_all_again
from amqtask.states import READY_STATES, REJECTED

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.ground.shapes import JsonObject
    from amqtask.history.client import PastTask

Form = Mapping[str, str]
# Tasks that are read at once; ids in one order to the workers.
PAGE, AT_ONCE = 500, 1_000
# Tasks that are counted: of millions that would take seconds.
MOST_COUNTED = 10_000
ENDED = (*sorted(READY_STATES), REJECTED)
_FIELDS = ("state", "task", "queue", "worker", "error", "text", "root_id", "stamp", "since", "until")
_TITLES = {"rerun": "Run again", "revoke": "Revoke"}


def confirmation(app: AmqTask, action: str, query: Form) -> JsonObject | None:
    """How many tasks fit the search, and of which states; `fields` say which, also when more have come. None: no such action.

    With `more` the numbers are those of the newest MOST_COUNTED and one, or of as many as were found soon, which is down to
    `looked_to`; older ones that fit are meant as well."""
    if action not in _TITLES:
        return None
    fields = {name: query[name] for name in _FIELDS if query.get(name)}
    fields["after"] = app.history.now()
    states = app.history.count(**asked(fields), most=MOST_COUNTED)
    meant = {state: number for state, number in states.items() if (state in ENDED) == (action == "rerun")}
    number = sum(meant.values())
    return {
        "action": action,
        "title": _TITLES[action],
        "number": number,
        "more": states.has_more,
        "looked_to": states.looked_to,
        "of": meant,
        "left_alone": states.total - number,
        "fields": fields,
    }


def rerun_all(app: AmqTask, form: Form, user: str) -> str:
    """Run all ended tasks that fit again, all at once or `rate` a second; `number` of them at most."""
    tasks = _meant(app, form, has_ended=True)
    done = run_all_again(app, tasks, rate=rate_of(form))
    refused = f"; {count(len(done.failed), 'task')} not, the first because: {done.failed[0][1]}" if done.failed else ""
    return f"{count(len(done.done), 'task')} run again{refused}"


def revoke_all(app: AmqTask, form: Form, user: str) -> str:
    """Have workers not run the tasks that fit and have not ended; `number` of them at most."""
    ids = [task.id for task in _meant(app, form, has_ended=False)]
    for start in range(0, len(ids), AT_ONCE):
        app.control.revoke(ids[start : start + AT_ONCE], terminate=form.get("terminate") == "yes")
    return f"{count(len(ids), 'task')} revoked"


def _meant(app: AmqTask, form: Form, *, has_ended: bool) -> Iterator[PastTask]:
    search = asked(form)
    if not any(search[name] for name in search if name != "after"):  # type: ignore[literal-required]
        raise ConfigurationError("say which tasks: a search that all tasks fit is none")
    written = form.get("number", "")
    remaining = int(written) if written.isascii() and written.isdigit() and len(written) < 19 else None
    while remaining is None or remaining > 0:
        page = app.history.find(**search, limit=PAGE)
        for task in page:
            if (task.state in ENDED) == has_ended and (remaining is None or remaining > 0):
                remaining = None if remaining is None else remaining - 1
                yield task
        if len(page) < PAGE:
            return
        search["after"] = page[-1].cursor


def rate_of(form: Form) -> float | None:
    """Messages a second; None: as fast as can be. Raises: ConfigurationError."""
    written = form.get("rate", "").strip()
    if not written:
        return None
    try:
        rate = float(written)
    except ValueError:
        rate = 0.0
    if not 0 < rate < math.inf:
        raise ConfigurationError(f"rate is a number of messages a second, more than 0, not {written!r}")
    return rate


def mark_seen(app: AmqTask, form: Form, user: str) -> str:
    """Mark a group of failures as seen, up to the `last` that was shown."""
    try:
        last = datetime.fromisoformat(form["last"])
        last.timestamp()
    except (ValueError, OverflowError, OSError):
        raise ConfigurationError(f"last is a time in ISO 8601, not {form['last']!r}") from None
    app.history.mark_seen(form.get("task", ""), form.get("error", ""), user, last=last)
    return f"{form.get('task')} with {form.get('error')} is marked as seen"
