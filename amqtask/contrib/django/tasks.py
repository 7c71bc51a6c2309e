"""Django's Tasks over amqtask: `TASKS = {"default": {"BACKEND": "amqtask.contrib.django.tasks.AmqTaskBackend"}}`.

Works with `django.tasks` (Django 6), and with its backport, the package django-tasks. Each of Django's tasks is a task of amqtask
of the same name, `<module>.<function>`, and its message is an ordinary one. What a result store does not know of a call (queue,
priority, when it was enqueued, which workers began it) is kept beside its result, under `<id>.call`, and travels in a header.
"""

from __future__ import annotations

import functools
import inspect
import uuid
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from asgiref.sync import sync_to_async
from django.core import checks
from django.core.exceptions import ImproperlyConfigured
from django.utils import timezone as zones
from django.utils.module_loading import import_string

from amqtask import states
from amqtask.client.registry import shared_task
from amqtask.contrib.django.project import project_app
from amqtask.contrib.django.zones import aware, stored
from amqtask.exceptions import AmqTaskError, WrongValue
from amqtask.ground.plugins import plugins
from amqtask.protocol.option_types import TASK, near_option, of_task
from amqtask.protocol.result import OURS, TWINS, ResultMessage, exception_as_dict, now_iso
from amqtask.task import AsyncTask
from amqtask.task import Task as AmqTaskTask

try:
    from django.tasks import DEFAULT_TASK_QUEUE_NAME, TaskContext, TaskResult, TaskResultStatus
    from django.tasks.backends.base import BaseTaskBackend
    from django.tasks.base import TASK_MAX_PRIORITY, Task, TaskError
    from django.tasks.exceptions import InvalidTask, TaskResultDoesNotExist
    from django.tasks.signals import task_enqueued, task_finished, task_started
    from django.utils.json import normalize_json
except ImportError:  # before Django 6
    if not TYPE_CHECKING:
        try:
            from django_tasks import DEFAULT_TASK_QUEUE_NAME, TaskContext, TaskResult, TaskResultStatus
            from django_tasks.backends.base import BaseTaskBackend
            from django_tasks.base import TASK_MAX_PRIORITY, Task, TaskError
            from django_tasks.exceptions import InvalidTaskError as InvalidTask
            from django_tasks.exceptions import TaskResultDoesNotExist
            from django_tasks.signals import task_enqueued, task_finished, task_started
            from django_tasks.utils import normalize_json
        except ModuleNotFoundError as error:
            raise ImproperlyConfigured(
                "amqtask.contrib.django.tasks needs Django 6, or its backport: pip install django-tasks"
            ) from error

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.backends.contract import ResultBackend
    from amqtask.ground.shapes import JsonObject, OptionDict

    AnyTask = Task[Any, Any]
    AnyResult = TaskResult[Any, Any]
    AnyContext = TaskContext[Any, Any]

__all__ = ["AmqTaskBackend"]

HEADER = "django_task"
# The state of the record of a call, which is not the state of its task.
ENQUEUED = "ENQUEUED"
_READY: Any = TaskResultStatus.READY
_STATUS = {
    states.PENDING: _READY,
    states.RECEIVED: _READY,
    states.RETRY: _READY,
    states.REJECTED: _READY,
    states.SUCCESS: TaskResultStatus.SUCCESSFUL,
    states.FAILURE: TaskResultStatus.FAILED,
    states.REVOKED: TaskResultStatus.FAILED,
}
# Django's priorities, -100 to 100, as 0 to 9: quorum queues before 4.3 know no more than 5 and above, and below.
_NORMAL, _LEVELS = 4, 5
# Of each name the task that was defined last (a module may be loaded again).
_defined: dict[str, AnyTask] = {}


class AmqTaskBackend(BaseTaskBackend):
    """See docs/django.md. OPTIONS: `app` ("package.module:app"), and options of amqtask's tasks for all tasks of this backend."""

    supports_defer = True
    supports_async_task = True
    supports_priority = True

    def __init__(self, alias: str, params: dict[str, Any]) -> None:
        super().__init__(alias, params)
        self._task_options: OptionDict = {name: value for name, value in self.options.items() if name != "app"}

    @property
    def app(self) -> AmqTask:
        """The application that publishes. Raises: AppNotFound."""
        named = self.options.get("app")
        app: AmqTask = plugins().load_app(str(named), f"TASKS[{self.alias!r}]") if named else project_app()
        return app

    @property
    def supports_get_result(self) -> bool:  # type: ignore[override] # Django's is an attribute of the class
        """Whether the application keeps results where every process can read them: not with `rpc://`, nor without a store."""
        return _readable(self.app) is not None

    def validate_task(self, task: AnyTask) -> None:
        """Raises: InvalidTask. A task that is valid is known to workers from now on."""
        super().validate_task(task)
        name = task.module_path
        if name not in _defined:
            _define(name, task, self._task_options)
        elif _defined[name].func is not task.func:
            _defined[name] = task

    def enqueue(self, task: AnyTask, args: Any, kwargs: Any) -> AnyResult:
        """Publish a call; returns when the broker has confirmed it. In a transaction that the outbox follows it is a row of that.

        Raises: InvalidTask; TypeError for arguments that the function does not take or JSON has not; PublishError.
        """
        self.validate_task(task)
        inspect.signature(task.func).bind(*((None,) if task.takes_context else ()), *args, **kwargs)
        result = _new_result(task, str(uuid.uuid4()), args, kwargs)
        app, record = self.app, _record_of(result)
        store = _readable(app)
        # First, so that a worker that is quick finds it. A publish that fails takes it away.
        _keep(store, result.id, record)
        try:
            sent = app.tasks[task.module_path].apply_async(
                result.args, result.kwargs, **self._call_options(result, record)
            )
        except BaseException:
            if store is not None:
                store.forget(_record_id(result.id))
            raise
        if app.conf.task_always_eager:
            _update(result, _find_record(store, result.id) or record, _ended_here(sent.final_meta, store))
        task_enqueued.send(type(self), task_result=result)
        return result

    def get_result(self, result_id: str) -> AnyResult:
        """The state of a call. Raises: TaskResultDoesNotExist (unknown, expired, of another backend), BackendUnreachable."""
        store = _readable(self.app)
        if store is None:
            super().get_result(result_id)  # it says that there are none
        assert store is not None
        record = _find_record(store, str(result_id))
        if record is None or record["backend"] != self.alias:
            raise TaskResultDoesNotExist(result_id)
        task = _as_called(_find_task(record["task"], result_id), record)
        result = _new_result(task, str(result_id), record["args"], record["kwargs"])
        _update(result, record, store.find(result.id))
        return result

    def check(self, **kwargs: Any) -> Any:
        """For `manage.py check`: an application that is not found, options that are none, queues that nobody declares."""
        label = f"TASKS[{self.alias!r}]"
        yield from self._check_options(label)
        try:
            app = self.app
            conf = app.conf
            missing = self.queues - {DEFAULT_TASK_QUEUE_NAME} - set(app.queues)
        except AmqTaskError as error:
            yield checks.Error(f"{label}: {error}", id="amqtask.E001")
            return
        if missing and not conf.task_create_missing_queues:
            names = ", ".join(sorted(missing))
            yield checks.Error(
                f"{label}: {names}: not in task_queues, and task_create_missing_queues is off", id="amqtask.E003"
            )
        if not self.supports_get_result:
            yield checks.Info(
                f"{label}: results cannot be read by id (get_result, refresh)",
                hint='Set result_backend to a store that all processes share: "redis://…", "django-db".',
                id="amqtask.I001",
            )

    def _check_options(self, label: str) -> Iterable[checks.CheckMessage]:
        for name in self._task_options.keys() - TASK.keys() | self._task_options.keys() & {"name", "queue", "priority"}:
            near = near_option(name) if name not in TASK else None
            yield checks.Error(
                f"{label}: OPTIONS has {name!r}, which is no option of all tasks",
                hint=f"Did you mean {near!r}?" if near else None,
                id="amqtask.E002",
            )
        try:
            of_task(label, {name: value for name, value in self._task_options.items() if name in TASK})
        except WrongValue as error:
            yield checks.Error(str(error), id="amqtask.E002")

    def _call_options(self, result: AnyResult, record: JsonObject) -> OptionDict:
        task = result.task
        options: OptionDict = {
            "task_id": result.id,
            "headers": {HEADER: {name: record[name] for name in _TRAVELS}},
            "priority": _amqp_priority(task.priority),
            "serializer": "json",
        }
        if task.run_after is not None:
            options["eta"] = aware(task.run_after)
        # "default" is Django's word for no queue in particular.
        if task.queue_name != DEFAULT_TASK_QUEUE_NAME or DEFAULT_TASK_QUEUE_NAME in self.app.queues:
            options["queue"] = task.queue_name
        return options


# -- in the worker


def _define(name: str, task: AnyTask, options: OptionDict) -> None:
    """Make the task one of amqtask's, in every application of this process."""
    _defined[name] = task
    # STARTED says that it runs; `enqueue` checks arguments.
    defaults: OptionDict = {"track_started": True, "typing": False}

    def run(self: AmqTaskTask[Any, Any], *args: Any, **kwargs: Any) -> Any:
        first = _begin(self, args, kwargs)
        return normalize_json(_defined[name].func(*first, *args, **kwargs))

    async def arun(self: AmqTaskTask[Any, Any], *args: Any, **kwargs: Any) -> Any:
        first = await sync_to_async(_begin)(self, args, kwargs)
        return normalize_json(await _defined[name].func(*first, *args, **kwargs))

    is_async = inspect.iscoroutinefunction(task.func)
    function = functools.wraps(task.func)(arun if is_async else run)
    del function.__wrapped__  # its signature is not this one's: the context comes first
    base = _AsyncDjangoTask if is_async else _DjangoTask
    shared_task(bind=True, name=name, base=base, **{**defaults, **options})(function)


class _Finishes(AmqTaskTask[Any, Any]):
    """Tells Django's receivers of the end of a task: success, or the failure after which nobody tries again."""

    abstract = True

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        self._finish(ResultMessage(task_id, states.SUCCESS, retval, date_done=now_iso()))

    def on_failure(self, exc: BaseException, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        self._finish(ResultMessage(task_id, states.FAILURE, exc, str(einfo.traceback), date_done=now_iso()))

    def _finish(self, end: ResultMessage) -> None:
        result = self.request.get(_RESULT)
        if result is not None:
            _update(result, _record_of(result), end)
            task_finished.send(type(result.task.get_backend()), task_result=result)


class _DjangoTask(_Finishes):
    abstract = True


class _AsyncDjangoTask(_Finishes, AsyncTask[Any, Any]):
    abstract = True


_RESULT = "django_task_result"


def _begin(running: AmqTaskTask[Any, Any], args: Any, kwargs: Any) -> tuple[AnyContext, ...]:
    """Note that the task runs, tell Django's receivers, and return what comes before its arguments."""
    task, context = _defined[running.name], running.request
    if context.id is None:
        raise InvalidTask(f"{running.name} runs in a worker: enqueue it, or call the function itself")
    store = _readable(running.app)
    kept = _find_record(store, context.id)
    record = _record_of_message(task, context.headers, args, kwargs)
    if kept is not None:
        begun, started_at = kept["worker_ids"], kept["started_at"]
    else:
        begun, started_at = [context.hostname] * context.retries, None  # nobody has noted the names
    now = now_iso()
    record |= {"worker_ids": [*begun, context.hostname], "started_at": started_at or now, "last_attempted_at": now}
    _keep(store, context.id, record)
    result = _new_result(_as_called(task, record), context.id, args, kwargs)
    _update(result, record, ResultMessage(context.id, states.STARTED))
    context.__dict__[_RESULT] = result
    task_started.send(sender=type(result.task.get_backend()), task_result=result)
    return (TaskContext(task_result=result),) if task.takes_context else ()


# -- records and results


def _readable(app: Any) -> ResultBackend | None:
    """The result store, if every process can read it by id."""
    store: ResultBackend | None = app.backend
    return None if store is None or store.reply_to() else store


def _record_id(result_id: str) -> str:
    return f"{result_id}.call"


def _keep(store: ResultBackend | None, result_id: str, record: JsonObject) -> None:
    """Raises: BackendUnreachable."""
    if store is not None:
        store.store(ResultMessage(_record_id(result_id), ENQUEUED, record, date_done=now_iso()))


def _ended_here(end: Any, store: ResultBackend | None) -> ResultMessage:
    """The result of a call that ran where it was made (task_always_eager), once it is where the others are."""
    value = exception_as_dict(end.result) if isinstance(end.result, BaseException) else end.result
    stored = ResultMessage(end.task_id, end.status, value, end.traceback, date_done=now_iso())
    if store is not None:
        store.store(stored)
    return stored


def _record_of(result: AnyResult) -> JsonObject:
    task = result.task
    return {
        "task": task.module_path,
        "args": result.args,
        "kwargs": result.kwargs,
        "backend": result.backend,
        "queue_name": task.queue_name,
        "priority": task.priority,
        "run_after": _iso(task.run_after),
        "enqueued_at": _iso(result.enqueued_at),
        "started_at": _iso(result.started_at),
        "last_attempted_at": _iso(result.last_attempted_at),
        "worker_ids": result.worker_ids,
    }


# What of a record travels in the message's header, with the types that each may have; anybody may have written the header.
_TRAVELS: dict[str, tuple[type, ...]] = {
    "backend": (str,),
    "queue_name": (str,),
    "priority": (int,),
    "run_after": (str, type(None)),
    "enqueued_at": (str, type(None)),
}


def _find_record(store: ResultBackend | None, result_id: str) -> JsonObject | None:
    """Raises: BackendUnreachable."""
    kept = store.find(_record_id(result_id)) if store is not None else None
    return kept.result if kept is not None and kept.status == ENQUEUED and isinstance(kept.result, dict) else None


def _record_of_message(task: AnyTask, headers: Mapping[str, Any], args: Any, kwargs: Any) -> JsonObject:
    """The record of a call as its message has it; of one that was not enqueued by Django, as far as it goes."""
    header = headers.get(HEADER)
    travelled = header if isinstance(header, Mapping) else {}
    record = _record_of(_new_result(task, "", args, kwargs)) | {"enqueued_at": None}
    return record | {
        name: travelled[name] for name, types in _TRAVELS.items() if isinstance(travelled.get(name, types), types)
    }


def _find_task(path: str, result_id: str) -> AnyTask:
    """Raises: TaskResultDoesNotExist: there is no such task any more."""
    defined = _defined.get(path)
    if defined is not None:
        return defined
    try:
        task = import_string(path)
    except ImportError as error:
        raise TaskResultDoesNotExist(f"{result_id}: its task {path!r} is not there: {error}") from error
    if not isinstance(task, Task):
        raise TaskResultDoesNotExist(f"{result_id}: {path!r} is no task of Django's")
    return task


def _as_called(task: AnyTask, record: JsonObject) -> AnyTask:
    """The task with the queue, priority and time of the call; as it was defined where TASKS does not allow them any more."""
    try:
        return task.using(
            priority=record["priority"],
            queue_name=record["queue_name"],
            run_after=_moment(record["run_after"]),
            backend=record["backend"],
        )
    except (InvalidTask, ImproperlyConfigured):
        return task


def _new_result(task: AnyTask, result_id: str, args: Any, kwargs: Any) -> AnyResult:
    return TaskResult(
        task=task,
        id=result_id,
        status=_READY,
        enqueued_at=zones.now(),
        started_at=None,
        finished_at=None,
        last_attempted_at=None,
        args=args,
        kwargs=kwargs,
        backend=task.backend,
        errors=[],
        worker_ids=[],
    )


def _update(result: AnyResult, record: JsonObject, state: ResultMessage | None) -> None:
    """Write what is known into a result, which is frozen for others."""
    status = _READY
    fields: dict[str, object] = {}
    if state is not None:
        status = _STATUS.get(state.status, TaskResultStatus.RUNNING)  # STARTED, and states of the task's own
        if state.is_ready:
            fields["finished_at"] = _moment(state.date_done)
        if state.status == states.SUCCESS:
            fields["_return_value"] = state.result
        elif state.status in states.EXCEPTION_STATES:
            fields["errors"] = [TaskError(exception_class_path=_class_path(state), traceback=state.traceback or "")]
    for name in ("enqueued_at", "started_at", "last_attempted_at"):
        fields[name] = _moment(record[name])
    for name, value in {**fields, "status": status, "worker_ids": list(record["worker_ids"])}.items():
        object.__setattr__(result, name, value)


def _class_path(state: ResultMessage) -> str:
    stored = exception_as_dict(state.result) if isinstance(state.result, BaseException) else state.result
    if not isinstance(stored, Mapping) or "exc_type" not in stored:
        return f"{OURS}.TaskRevokedError"
    name, module = str(stored["exc_type"]), str(stored.get("exc_module") or "builtins")
    # Under Celery's name in the store, which need not be installed here.
    return f"{OURS if module == 'celery.exceptions' and name in TWINS else module}.{name}"


def _amqp_priority(priority: int) -> int:
    """0 to 3 below normal, 4 normal, 5 to 9 above it."""
    if priority > 0:
        return _NORMAL + -(-priority * _LEVELS // TASK_MAX_PRIORITY)
    return _NORMAL - -(priority * _NORMAL // TASK_MAX_PRIORITY)


def _iso(moment: datetime | None) -> str | None:
    return None if moment is None else aware(moment).astimezone(timezone.utc).isoformat()


def _moment(text: str | None) -> datetime | None:
    """A time as the project has them: aware, or naive with USE_TZ off."""
    return None if text is None else stored(datetime.fromisoformat(text))
