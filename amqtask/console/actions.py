"""What an operator can do in the console. Each action is written into the audit list, with who did it, before it is done."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from amqtask.beat.operating import Schedules
from amqtask.console.alerts import send_test
from amqtask.console.pages import (
    ANSWER_SECONDS,
    ENDED,
    asked,
    is_celery,
    is_dead_letter,
    named_queues,
    which_delayed,
    whole_number,
)
from amqtask.exceptions import AlreadyQueued, AmqTaskError, ConfigurationError, QueueNotFound
from amqtask.ground.printable import count
from amqtask.protocol.entities import Queue
from amqtask.remote.kept import pause_of
from amqtask.services.commands import MOST_MORE
from amqtask.services.delayed import Which, release
from amqtask.services.rerunning import Pace, back_to_work, check_key, run_all_again, run_edited, work_queue_of

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.history.client import PastTask
    from amqtask.protocol.message import Delivery, Message

T = TypeVar("T", list[Any], dict[str, Any])
Form = Mapping[str, str]
Action = Callable[["AmqTask", Form, str], str]
# Seconds that one worker has to answer an order: whoever does not is busy, or gone.
ORDER_SECONDS = 3.0
# Tasks that are read at once; ids in one order to the workers.
PAGE, AT_ONCE = 500, 1_000


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
    held: list[AlreadyQueued] = []

    def convert(delivery: Delivery) -> Message | None:
        is_meant = is_all or is_dead_letter(
            delivery, task_id=form.get("id"), task=form.get("task") or None, reason=form.get("reason")
        )
        if not is_meant:
            return None
        message = back_to_work(delivery, work_queue_of(delivery, suffix), without_expiry=True)
        try:
            check_key(app, message)
        except AlreadyQueued as error:
            held.append(error)
            return None
        return pace(message)

    with app.broker.admin() as admin:
        done = admin.move(form["queue"], app.publisher, convert)
    if done.failure is not None:
        raise ConfigurationError(f"{count(done.moved, 'message')} back to work, the others stay: {done.failure}")
    if held and not done.moved:
        raise held[0]
    stays = f"; {count(len(held), 'message')} not, the first because {held[0]}" if held else ""
    return f"{count(done.moved, 'message')} back to work{stays}"


# -- orders for one worker, ours or Celery's: the commands of remote control, and what it answers


def resize(app: AmqTask, form: Form, user: str, *, command: str) -> str:
    """More slots, or fewer: `n` (default: 1)."""
    written = form.get("n", "").strip()
    slots = whole_number(form, "n") if written else 1
    if slots is None or not 1 <= slots <= MOST_MORE:
        raise ConfigurationError(f"n is a number of slots from 1 to {MOST_MORE}, not {written!r}")
    return _order(app, form["worker"], command, n=slots)


def add_queue(app: AmqTask, form: Form, user: str) -> str:
    """Have a worker consume one more queue, until it restarts."""
    worker, queue = form["worker"], _named(form, "queue")
    if is_celery(_answer(app, worker, "stats")):
        _check_plain(app, worker, queue)
    return _order(app, worker, "add_consumer", queue=queue)


def _check_plain(app: AmqTask, worker: str, queue: str) -> None:
    """Celery's worker declares a queue that it is told of, and ends when the broker has another of that name.

    Raises: ConfigurationError for a queue that it would end on."""
    with app.broker.admin() as admin:
        try:
            admin.state(queue)
        except QueueNotFound:
            return  # it makes a plain one
        refusal = admin.declare(Queue(queue), passive=False)
    if refusal is not None:
        raise ConfigurationError(
            f"{worker} is a worker of Celery's: it would declare {queue} as a plain queue, and end, because the broker refuses "
            f"that ({refusal.reply_text}). Name the queue with its arguments in its task_queues, and restart it"
        )


def remove_queue(app: AmqTask, form: Form, user: str) -> str:
    """Have a worker consume a queue no more, until it restarts."""
    return _order(app, form["worker"], "cancel_consumer", queue=_named(form, "queue"))


def drain(app: AmqTask, form: Form, user: str) -> str:
    """Have a worker take no more tasks: it finishes what it has, and stays. Its queues are in the answer, to be added again."""
    worker = form["worker"]
    queues = _answer(app, worker, "active_queues")
    names = [str(queue["name"]) for queue in queues if isinstance(queue, dict) and queue.get("name")]
    for name in names:
        _order(app, worker, "cancel_consumer", queue=name)
    return f"{worker} takes no more tasks; it consumed {', '.join(names) or 'nothing'}"


def restart(app: AmqTask, form: Form, user: str) -> str:
    """Have a worker replace its pool's processes, each after its task."""
    return _order(app, form["worker"], "pool_restart", modules=[])


def shut_down(app: AmqTask, form: Form, user: str) -> str:
    """Have a worker end after the tasks that it runs; whoever keeps it running starts it anew."""
    worker = form["worker"]
    _answer(app, worker, "ping")
    app.control.shutdown(destination=[worker])
    return f"{worker} ends after what it runs"


def limit_rate(app: AmqTask, form: Form, user: str) -> str:
    """Another rate limit of a task, for one worker, or for all that answer: 10/m; nothing, or 0: none."""
    order = {"task_name": _named(form, "task"), "rate_limit": form.get("limit", "").strip() or 0}
    if form.get("worker"):
        return _order(app, form["worker"], "rate_limit", **order)
    answers = app.control.ask("rate_limit", order, timeout=ANSWER_SECONDS)
    if not answers:
        raise ConfigurationError("no worker answers")
    return "; ".join(f"{worker}: {_told(answer)}" for worker, answer in sorted(answers.items()))


def _named(form: Form, field: str) -> str:
    name = form[field].strip()
    if not name:
        raise ConfigurationError(f"{field} is empty")
    return name


def _answer(app: AmqTask, worker: str, command: str, **arguments: object) -> Any:
    """What the worker answers. Raises: ConfigurationError when it does not, or says that it did not work."""
    answers = app.control.ask(command, arguments, destination=[worker], timeout=ORDER_SECONDS, limit=1)
    if worker not in answers:
        raise ConfigurationError(f"{worker} does not answer, so it may have done it or not")
    answer = answers[worker]
    if isinstance(answer, dict) and "error" in answer:
        raise ConfigurationError(f"{worker}: {answer['error']}")
    return answer


def _order(app: AmqTask, worker: str, command: str, **arguments: object) -> str:
    return f"{worker}: {_told(_answer(app, worker, command, **arguments))}"


def _told(answer: object) -> str:
    """What a worker of ours or of Celery's says, in one line."""
    if isinstance(answer, dict) and len(answer) == 1:
        ((how, text),) = answer.items()
        return str(text) if how == "ok" else f"{how}: {text}"
    return str(answer)


# -- all tasks that a search has, after a page that says how many they are; failures that were seen


def rerun_all(app: AmqTask, form: Form, user: str) -> str:
    """Run all ended tasks that fit again, all at once or `rate` a second; `number` of them at most."""
    tasks = _searched(app, form, has_ended=True)
    done = run_all_again(app, tasks, rate=rate_of(form))
    refused = f"; {count(len(done.failed), 'task')} not, the first because: {done.failed[0][1]}" if done.failed else ""
    return f"{count(len(done.done), 'task')} run again{refused}"


def revoke_all(app: AmqTask, form: Form, user: str) -> str:
    """Have workers not run the tasks that fit and have not ended; `number` of them at most."""
    ids = [task.id for task in _searched(app, form, has_ended=False)]
    for start in range(0, len(ids), AT_ONCE):
        app.control.revoke(ids[start : start + AT_ONCE], terminate=form.get("terminate") == "yes")
    return f"{count(len(ids), 'task')} revoked"


def _searched(app: AmqTask, form: Form, *, has_ended: bool) -> Iterator[PastTask]:
    search = asked(form)
    if not any(search[name] for name in search if name != "after"):  # type: ignore[literal-required]
        raise ConfigurationError("say which tasks: a search that all tasks fit is none")
    remaining = whole_number(form, "number")
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


# -- delayed tasks


def send_now(app: AmqTask, form: Form, user: str) -> str:
    """Send delayed tasks to their queues now: one by its id, those of a task or a queue, or with `all` all of them."""
    return _released(release(app, _delayed_meant(form)), "sent now")


def revoke_delayed(app: AmqTask, form: Form, user: str) -> str:
    """Revoke delayed tasks: they go to their queues as expired, where a worker drops them and says so."""
    return _released(release(app, _delayed_meant(form), revoked=True), "revoked")


def _released(number: int, what: str) -> str:
    """Where nothing was done, also why that may be."""
    celery = "" if number else "; what a worker of Celery's holds it keeps: revoke that on the task's page"
    return f"{count(number, 'delayed task')} {what}{celery}"


def _delayed_meant(form: Form) -> Which:
    which = which_delayed(form)
    if which == Which() and form.get("all") != "yes":
        raise ConfigurationError("say which delayed tasks: id, task, queue, or all=yes")
    return which


# -- limits over all workers, periodic tasks


def set_limit(app: AmqTask, form: Form, user: str) -> str:
    """Have a limit be another number in all workers: a whole number, or a rate as 500/m with its burst."""
    burst = form.get("burst", "").strip()
    if burst and not burst.isdecimal():
        raise ConfigurationError(f"a burst is a whole number, not {burst}")
    task, limit, value = form["task"], form["limit"], form["value"].strip()
    app.limits.set(task, limit, value, burst=int(burst) if burst else None, by=user)
    return f"{limit} of {task} is {value}"


def reset_limit(app: AmqTask, form: Form, user: str) -> str:
    """Have a limit be what the code says again."""
    task, limit = form["task"], form["limit"]
    return f"{limit} of {task} is what the code says" + ("" if app.limits.reset(task, limit) else ", as it was")


def pause_schedule(app: AmqTask, form: Form, user: str) -> str:
    """Have no beat send an entry."""
    name = form["name"]
    return f"{name} is paused" if Schedules(app).pause(name, user) else f"{name} was paused already"


def resume_schedule(app: AmqTask, form: Form, user: str) -> str:
    """Have beat send it again."""
    name = form["name"]
    return f"{name} is resumed" if Schedules(app).resume(name) else f"{name} was not paused"


def run_schedule(app: AmqTask, form: Form, user: str) -> str:
    """Send the task of an entry now."""
    name = form["name"]
    try:
        return f"{name} is sent as {Schedules(app).run(name)}"
    except AmqTaskError:
        raise
    except Exception as error:  # arguments that are worked out, and routers, are the user's
        raise ConfigurationError(f"{name} cannot be sent: {type(error).__name__}: {error}") from error


# -- all of them


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
    "worker-grow": partial(resize, command="pool_grow"),
    "worker-shrink": partial(resize, command="pool_shrink"),
    "worker-add-queue": add_queue,
    "worker-remove-queue": remove_queue,
    "worker-drain": drain,
    "worker-restart": restart,
    "worker-shutdown": shut_down,
    "rate-limit": limit_rate,
}
