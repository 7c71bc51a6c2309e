"""What an operator can do in the console. Each action is written into the audit list, with who did it, before it is done."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from amqtask.client.rerun import run_edited
from amqtask.console import workers
from amqtask.console.alerts.page import send_test
from amqtask.console.delayed import revoke_delayed, send_now
from amqtask.console.limits import reset_limit, set_limit
from amqtask.console.many import mark_seen, rate_of, rerun_all, revoke_all
from amqtask.console.pages import is_dead_letter, named_queues
from amqtask.console.schedules import pause_schedule, resume_schedule, run_schedule
from amqtask.exceptions import ConfigurationError, QueueNotFound
from amqtask.ground.printable import count
from amqtask.remote.pauses import pause_of
from amqtask.services.dead_letters import back_to_work, work_queue_of
from amqtask.services.rerunning import Pace, run_all_again

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.protocol.message import Delivery, Message

T = TypeVar("T", list[Any], dict[str, Any])
Form = Mapping[str, str]
Action = Callable[["AmqTask", Form, str], str]


def rerun(app: AmqTask, form: Form, user: str) -> str:
    """Run a task again, as it was, or with the arguments of the form."""
    history = app.history.get(form.get("id", ""))
    if history is None:
        raise ConfigurationError(f"nothing is known of a task {form.get('id')}")
    if "args" in form or "kwargs" in form:
        args, kwargs = _json(form, "args", list), _json(form, "kwargs", dict)
        new = run_edited(app, history.task, args, kwargs)
        return f"{history.task.name} runs again as {new}"
    for _, error in run_all_again(app, [history.task]).failed:
        raise error
    return f"{history.task.name} runs again"


def rerun_group(app: AmqTask, form: Form, user: str) -> str:
    """Run all failures of a task with one class of exception again."""
    return rerun_all(app, {**form, "state": "FAILURE", "task": form["task"], "error": form["error"]}, user)


def revoke(app: AmqTask, form: Form, user: str) -> str:
    """Have a task not run; end it if it runs and that is asked for."""
    app.control.revoke(form["id"], terminate=form.get("terminate") == "yes")
    return f"{form['id']} is revoked"


def cancel(app: AmqTask, form: Form, user: str) -> str:
    """Cancel a workflow, by the id of any task or group of it: what is to come of it does not run."""
    some_id = form["id"]
    tasks = app.history.workflow(some_id)
    known = {one for task in tasks for one in (task.id, task.group_id, task.joins) if one}
    app.control.cancel(sorted({some_id, *known}), terminate=form.get("terminate") == "yes")
    return f"the workflow of {some_id} is cancelled; {count(len(tasks), 'task')} of it known"


def pause(app: AmqTask, form: Form, user: str) -> str:
    """Pause a queue."""
    answers = app.control.pause_queue(form["queue"], user)
    return f"{form['queue']} is paused; {count(len(answers), 'worker')} answered"


def resume(app: AmqTask, form: Form, user: str) -> str:
    """Resume a queue, or the one that a shard is paused with."""
    pause = pause_of(app.control.pauses.read(), form["queue"])
    name = form["queue"] if pause is None else pause.queue
    answers = app.control.resume_queue(name)
    return f"{name} is resumed; {count(len(answers), 'worker')} answered"


def purge(app: AmqTask, form: Form, user: str) -> str:
    """Delete all ready messages of a queue; its name was typed in."""
    name = form["queue"]
    if form.get("confirm") != name:
        raise ConfigurationError(f"type the name {name} to delete its messages")
    names = {one for queue, dead in named_queues(app) for one in (queue.name, dead)}
    if name not in names:
        raise QueueNotFound(f"{name} is none of the application's queues")
    with app.broker.admin() as admin:
        return f"{count(admin.purge(name), 'message')} deleted from {name}"


def retry_dead(app: AmqTask, form: Form, user: str) -> str:
    """Send dead letters back to work, all at once or at a `rate`: one by its id, those of a task that died for one reason,
    or with `all` those of a queue."""
    suffix: str = app.conf.task_dead_letter_suffix
    pace = Pace(app, rate_of(form))
    is_all = form.get("all") == "yes"

    def convert(delivery: Delivery) -> Message | None:
        is_meant = is_all or is_dead_letter(
            delivery, task_id=form.get("id"), task=form.get("task") or None, reason=form.get("reason")
        )
        return pace(back_to_work(delivery, work_queue_of(delivery, suffix), without_expiry=True)) if is_meant else None

    with app.broker.admin() as admin:
        done = admin.move(form["queue"], app.publisher, convert)
    if done.failure is not None:
        raise ConfigurationError(f"{count(done.moved, 'message')} back to work, the others stay: {done.failure}")
    return f"{count(done.moved, 'message')} back to work"


def _json(form: Form, name: str, json_type: type[T]) -> T | None:
    written = form.get(name, "").strip()
    if not written:
        return None
    try:
        value = json.loads(written)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{name} is not JSON: {error}") from error
    if not isinstance(value, json_type):
        raise ConfigurationError(f"{name} is a JSON {'list' if json_type is list else 'object'}")
    return value


# What is done once where several ask for it at once.
ONCE = frozenset({"rerun", "rerun-all", "rerun-group", "schedule-run"})
ACTIONS: dict[str, Action] = {
    "rerun": rerun,
    "rerun-group": rerun_group,
    "rerun-all": rerun_all,
    "revoke-all": revoke_all,
    "mark-seen": mark_seen,
    "send-now": send_now,
    "revoke-delayed": revoke_delayed,
    "revoke": revoke,
    "cancel": cancel,
    "pause": pause,
    "resume": resume,
    "purge": purge,
    "retry-dead": retry_dead,
    "alert-test": send_test,
    "schedule-pause": pause_schedule,
    "schedule-resume": resume_schedule,
    "schedule-run": run_schedule,
    "limit-set": set_limit,
    "limit-reset": reset_limit,
    **workers.ACTIONS,
}
