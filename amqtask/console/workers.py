"""What an operator orders workers to do, ours and Celery's: the commands of remote control, and what a worker answers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from amqtask.console.pages import ANSWER_SECONDS, is_celery
from amqtask.exceptions import ConfigurationError, QueueNotFound
from amqtask.protocol.entities import Queue
from amqtask.services.commands import MOST_MORE

if TYPE_CHECKING:
    from collections.abc import Callable

    from amqtask.app import AmqTask

Form = Mapping[str, str]
# Seconds that one worker has to answer an order: whoever does not is busy, or gone.
ORDER_SECONDS = 3.0


def resize(app: AmqTask, form: Form, user: str, *, command: str) -> str:
    """More slots, or fewer: `n` (default: 1)."""
    written = form.get("n", "").strip() or "1"
    if not (written.isascii() and written.isdigit() and len(written) < 10 and 1 <= int(written) <= MOST_MORE):
        raise ConfigurationError(f"n is a number of slots from 1 to {MOST_MORE}, not {written!r}")
    return _order(app, form["worker"], command, n=int(written))


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


ACTIONS: dict[str, Callable[[AmqTask, Form, str], str]] = {
    "worker-grow": partial(resize, command="pool_grow"),
    "worker-shrink": partial(resize, command="pool_shrink"),
    "worker-add-queue": add_queue,
    "worker-remove-queue": remove_queue,
    "worker-drain": drain,
    "worker-restart": restart,
    "worker-shutdown": shut_down,
    "rate-limit": limit_rate,
}
