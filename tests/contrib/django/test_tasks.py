"""Django's Tasks (django.tasks, or its backport before Django 6) over amqtask."""

from __future__ import annotations

import asyncio
import gc
import importlib
import pickle
import queue
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from amqtask import AmqTask, Retry
from amqtask.assembly import build_relay
from amqtask.exceptions import ConfigurationError, PublishError
from amqtask.ground import current
from amqtask.protocol.result import ResultMessage, exception_as_dict
from amqtask.testing.worker import start_worker

BACKEND = "amqtask.contrib.django.tasks.AmqTaskBackend"


@pytest.fixture
def jobs(project: AmqTask) -> Iterator[Any]:
    """The shop's tasks, which the project's application publishes."""
    tasks = pytest.importorskip("integration.apps.django_site.shop.jobs")
    with current.replaced(project):
        yield tasks


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Connections that Django keeps for threads end with these, unclosed; Python 3.13 warns of SQLite's."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def django_names() -> Any:
    """Names of Django's, wherever they are: in django.tasks or in its backport."""
    return importlib.import_module("amqtask.contrib.django.tasks")


@contextmanager
def backend(**params: Any) -> Iterator[Any]:
    """Another description of the default backend."""
    from django.test import override_settings

    from amqtask.contrib.django.tasks import AmqTaskBackend

    described = {"BACKEND": BACKEND, "QUEUES": ["default", "slow"], **params}
    with override_settings(TASKS={"default": described, "other": {"BACKEND": BACKEND, "QUEUES": []}}):
        yield AmqTaskBackend("default", described)


def ended(result: Any, app: AmqTask) -> Any:
    """The result when it has ended."""
    with suppress(Exception):
        app.AsyncResult(result.id).get(timeout=60)
    result.refresh()
    return result


def test_a_task_runs_in_a_worker_and_its_result_is_read_by_id(project: AmqTask, jobs: Any) -> None:
    with start_worker(project):
        result = jobs.add.enqueue(2, second=3)
        assert (result.status.value, result.args, result.kwargs) == ("READY", [2], {"second": 3})
        assert (result.is_finished, result.attempts, result.backend) == (False, 0, "default")
        with pytest.raises(ValueError, match="not finished"):
            _ = result.return_value

        ended(result, project)
        found = jobs.add.get_result(result.id)

    assert result.return_value == found.return_value == 5
    assert (found.status.value, found.is_finished, found.attempts, found.errors) == ("SUCCESSFUL", True, 1, [])
    assert found.enqueued_at <= found.started_at <= found.finished_at
    assert found.last_attempted_at == found.started_at
    assert (found.args, found.kwargs, found.task) == ([2], {"second": 3}, jobs.add)
    assert found.worker_ids[0].count("@") == 1


@pytest.mark.parametrize("pool", ["threads", "asyncio"])
def test_coroutines_run_and_can_be_enqueued_and_read_by_coroutines(project: AmqTask, jobs: Any, pool: str) -> None:
    from django.db import connections

    async def enqueue() -> Any:
        result = await jobs.order.aenqueue("books")
        await project.AsyncResult(result.id).aget(timeout=60)
        await result.arefresh()
        return result, await jobs.order.aget_result(result.id)

    with start_worker(project, pool=pool):
        result, found = asyncio.run(enqueue())
    connections.close_all()

    assert result.return_value == found.return_value > 0
    assert found.attempts == 1


def test_a_failure_has_its_class_and_its_traceback(project: AmqTask, jobs: Any) -> None:
    with start_worker(project):
        result = ended(jobs.fail.enqueue(), project)

    assert (result.status.value, result.is_finished) == ("FAILED", True)
    (error,) = result.errors
    assert error.exception_class is ValueError
    assert "no such customer" in error.traceback
    with pytest.raises(ValueError, match="failed"):
        _ = result.return_value


def test_what_json_has_not_is_refused_at_once_and_as_a_return_value_fails(project: AmqTask, jobs: Any) -> None:
    with pytest.raises(TypeError, match="type"):
        jobs.add.enqueue(datetime(2026, 1, 1), 2)
    with start_worker(project):
        result = ended(jobs.no_json.enqueue(), project)

    assert result.status.value == "FAILED"
    assert result.errors[0].exception_class is TypeError


def test_arguments_are_what_json_makes_of_them(project: AmqTask, jobs: Any) -> None:
    with start_worker(project):
        result = ended(jobs.add.enqueue((1, 2), ["x"]), project)

    assert result.args == [[1, 2], ["x"]]
    assert result.return_value == [1, 2, "x"]


def test_wrong_arguments_are_refused_before_anything_is_sent(jobs: Any) -> None:
    with pytest.raises(TypeError, match="second"):
        jobs.add.enqueue(1)
    with pytest.raises(TypeError, match="too many"):
        jobs.about.enqueue("a note", "another")


def test_a_task_that_takes_the_context_knows_its_call(project: AmqTask, jobs: Any) -> None:
    with start_worker(project, queues=["site", "slow"]):
        result = ended(jobs.about.using(queue_name="slow", priority=-7).enqueue(note="hello"), project)

    assert result.return_value == [result.id, 1, "RUNNING", "slow", -7, [], {"note": "hello"}, "hello"]
    assert (result.task.queue_name, result.task.priority) == ("slow", -7)


def test_attempts_are_counted_over_retries(project: AmqTask, jobs: Any) -> None:
    with start_worker(project):
        result = ended(jobs.third_time.enqueue(), project)

    assert (result.return_value, result.attempts, result.errors) == (3, 3, [])
    assert result.last_attempted_at > result.started_at


def test_attempts_are_counted_without_a_result_store_too(project: AmqTask, jobs: Any) -> None:
    project.conf.result_backend = None
    task_finished = django_names().task_finished
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def keep(sender: Any, task_result: Any, **_: Any) -> None:
        results.put(task_result)

    task_finished.connect(keep)
    try:
        with start_worker(project):
            sent = jobs.third_time.enqueue()
            result = results.get(timeout=60)
    finally:
        task_finished.disconnect(keep)

    assert (result.id, result.attempts) == (sent.id, 3)


def test_the_queue_is_the_applications_unless_another_is_named(project: AmqTask, jobs: Any) -> None:
    broker = project.memory_broker
    assert broker is not None
    jobs.add.enqueue(1, 2)
    jobs.slow.enqueue()
    jobs.add.using(backend="other", queue_name="anything").enqueue(1, 2)

    assert {name: broker.count(name) for name in (project.conf.task_default_queue, "slow", "anything")} == {
        project.conf.task_default_queue: 1,
        "slow": 1,
        "anything": 1,
    }


@pytest.mark.parametrize(
    ("priority", "sent"), [(-100, 0), (-51, 1), (-1, 3), (0, 4), (1, 5), (20, 5), (50, 7), (100, 9)]
)
def test_priorities_keep_their_order(project: AmqTask, jobs: Any, priority: int, sent: int) -> None:
    jobs.add.using(priority=priority).enqueue(1, 2)

    broker = project.memory_broker
    assert broker is not None
    ((properties, _),) = broker.messages(project.conf.task_default_queue)
    assert properties.priority == sent


def test_a_task_that_shall_run_later_waits(project: AmqTask, jobs: Any) -> None:
    later = datetime.now(timezone.utc) + timedelta(hours=1)
    result = jobs.add.using(run_after=later).enqueue(1, 2)
    soon = jobs.add.using(run_after=datetime.now(timezone.utc) - timedelta(hours=1)).enqueue(1, 2)

    with start_worker(project):
        ended(soon, project)
        result.refresh()

    assert soon.status.value == "SUCCESSFUL"
    assert result.status.value == "READY"
    assert jobs.add.get_result(result.id).task.run_after == later


def test_unknown_results_and_those_of_others_do_not_exist(project: AmqTask, jobs: Any) -> None:
    errors = django_names()
    with pytest.raises(errors.TaskResultDoesNotExist):
        jobs.add.get_result("nothing")
    plain = project.send_task("integration.apps.django_site.shop.tasks.count")
    with pytest.raises(errors.TaskResultDoesNotExist):
        jobs.add.get_result(plain.id)

    other = jobs.add.using(backend="other").enqueue(1, 2)
    with pytest.raises(errors.TaskResultDoesNotExist):
        jobs.add.get_result(other.id)
    assert jobs.add.using(backend="other").get_result(other.id).id == other.id


def test_a_result_of_another_task_is_a_mismatch(jobs: Any) -> None:
    result = jobs.add.enqueue(1, 2)

    with pytest.raises(Exception, match="does not match") as raised:
        jobs.fail.get_result(result.id)
    assert type(raised.value).__name__ == "TaskResultMismatch"


def test_a_result_whose_task_is_gone_does_not_exist(project: AmqTask, jobs: Any) -> None:
    errors = django_names()
    result = jobs.add.enqueue(1, 2)
    store: Any = project.backend
    record = store.find(f"{result.id}.call").result
    for path in ("integration.apps.django_site.shop.jobs.gone", "os.system"):
        store.store(ResultMessage(f"{result.id}.call", "ENQUEUED", {**record, "task": path}))
        with pytest.raises(errors.TaskResultDoesNotExist, match=r"jobs\.gone|os\.system"):
            result.refresh()


@pytest.mark.parametrize("state", ["REVOKED", "RETRY", "PROGRESS", "STARTED"])
def test_every_state_has_its_status(project: AmqTask, jobs: Any, state: str) -> None:
    result = jobs.add.enqueue(1, 2)
    store: Any = project.backend
    is_error = state in ("REVOKED", "RETRY")
    value = exception_as_dict(Retry("again") if state == "RETRY" else KeyError("x")) if is_error else {"done": 1}
    store.store(ResultMessage(result.id, state, value))
    result.refresh()

    assert result.status.value == {"REVOKED": "FAILED", "RETRY": "READY"}.get(state, "RUNNING")
    assert [error.exception_class for error in result.errors] == (
        [] if not is_error else [Retry if state == "RETRY" else KeyError]
    )


def test_without_a_shared_store_results_cannot_be_read(project: AmqTask, jobs: Any) -> None:
    with backend() as described:
        assert described.supports_get_result is True
        for url in ("rpc://", None):
            project.conf.result_backend = url
            assert described.supports_get_result is False
            result = jobs.add.enqueue(1, 2)
            with pytest.raises(NotImplementedError):
                result.refresh()
        assert [(message.id, message.level) for message in described.check()] == [("amqtask.I001", 20)]


def test_what_could_not_be_published_leaves_nothing(project: AmqTask, jobs: Any) -> None:
    errors = django_names()
    project.conf.task_create_missing_queues = False
    ids: list[str] = []
    store: Any = project.backend
    keep = store.store

    def store_and_note(result: ResultMessage) -> None:
        ids.append(result.task_id)
        keep(result)

    store.store = store_and_note

    with pytest.raises((ConfigurationError, PublishError)):
        jobs.slow.enqueue()

    assert len(ids) == 1
    with pytest.raises(errors.TaskResultDoesNotExist):
        jobs.slow.get_result(ids[0].removesuffix(".call"))


def test_with_the_outbox_a_task_is_enqueued_when_its_transaction_is_committed(project: AmqTask, jobs: Any) -> None:
    from django.db import transaction

    project.conf.outbox = True
    project.finalize()
    with transaction.atomic():
        kept = jobs.add.enqueue(1, 2)
    with suppress(LookupError), transaction.atomic():
        jobs.add.enqueue(3, 4)
        raise LookupError
    broker = project.memory_broker
    assert broker is not None
    assert "site" not in broker.queue_names() or broker.count("site") == 0

    relay = build_relay(project)
    assert relay.drain().sent == 1
    with start_worker(project):
        assert ended(kept, project).return_value == 3


def test_without_the_outbox_it_is_enqueued_at_once_unless_on_commit_is_asked_for(project: AmqTask, jobs: Any) -> None:
    from django.db import transaction

    broker = project.memory_broker
    assert broker is not None
    queue = project.conf.task_default_queue
    with transaction.atomic():
        jobs.add.enqueue(1, 2)
        transaction.on_commit(lambda: jobs.add.enqueue(3, 4))
        assert broker.count(queue) == 1
    assert broker.count(queue) == 2


def test_receivers_are_told_of_the_call_the_start_and_the_end(project: AmqTask, jobs: Any) -> None:
    names = django_names()
    heard: list[tuple[str, str, Any]] = []

    def hear(name: str) -> Any:
        def receiver(sender: Any, task_result: Any, **_: Any) -> None:
            assert sender is names.AmqTaskBackend
            heard.append((name, task_result.status.value, len(task_result.errors)))

        return receiver

    receivers = [
        (signal, hear(name))
        for name, signal in (("e", names.task_enqueued), ("s", names.task_started), ("f", names.task_finished))
    ]
    for signal, receiver in receivers:
        signal.connect(receiver, weak=False)
    try:
        with start_worker(project):
            ended(jobs.add.enqueue(1, 2), project)
            ended(jobs.fail.enqueue(), project)
    finally:
        for signal, receiver in receivers:
            signal.disconnect(receiver)

    assert sorted(heard) == [
        ("e", "READY", 0),
        ("e", "READY", 0),
        ("f", "FAILED", 1),
        ("f", "SUCCESSFUL", 0),
        ("s", "RUNNING", 0),
        ("s", "RUNNING", 0),
    ]


def test_called_eagerly_a_task_has_ended_when_it_is_enqueued(project: AmqTask, jobs: Any) -> None:
    project.conf.task_always_eager = True

    done, failed = jobs.add.enqueue(1, 2), jobs.fail.enqueue()

    assert (done.return_value, done.attempts) == (3, 1)
    assert (failed.status.value, failed.errors[0].exception_class) == ("FAILED", ValueError)
    done.refresh()
    assert done.return_value == 3


def test_a_worker_runs_what_others_publish_under_its_name(project: AmqTask, jobs: Any) -> None:
    name = jobs.about.module_path
    with start_worker(project):
        plain = project.send_task(name, kwargs={"note": "hello"}, headers={"django_task": {"priority": "high"}})
        value = plain.get(timeout=60)

    assert value == [plain.id, 1, "RUNNING", "default", 0, [], {"note": "hello"}, "hello"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"queue_name": "nowhere"}, "Queue 'nowhere' is not valid"),
        ({"priority": 101}, "priority must be a whole number"),
        ({"priority": 1.5}, "priority must be a whole number"),
        ({"run_after": datetime(2026, 1, 1)}, "run_after must be an aware datetime"),
    ],
)
def test_a_wrong_task_is_refused_in_djangos_words(jobs: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(django_names().InvalidTask, match=words):
        jobs.add.using(**changes)


def test_only_functions_of_modules_are_tasks(jobs: Any) -> None:
    with pytest.raises(django_names().InvalidTask, match="module level"):
        django_names().Task(func=lambda: None)


def test_functions_stay_functions_and_tasks_are_pickled(jobs: Any) -> None:
    import django

    assert jobs.add.func(1, 2) == jobs.add.call(1, 2) == 3
    if django.VERSION >= (6, 1):
        assert pickle.loads(pickle.dumps(jobs.slow)) == jobs.slow


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, []),
        ({"OPTIONS": {"max_retires": 3}}, ["amqtask.E002"]),
        ({"OPTIONS": {"max_retries": "many"}}, ["amqtask.E002"]),
        ({"OPTIONS": {"queue": "slow"}}, ["amqtask.E002"]),
        ({"OPTIONS": {"app": "nowhere.at:all"}}, ["amqtask.E001"]),
        ({"QUEUES": ["default", "unheard"]}, ["amqtask.E003"]),
    ],
)
def test_manage_check_tells_what_is_wrong(
    project: AmqTask, jobs: Any, params: dict[str, Any], expected: list[str]
) -> None:
    project.conf.task_create_missing_queues = "QUEUES" not in params
    with backend(**params) as described:
        assert [message.id for message in described.check()] == expected


def test_without_time_zones_times_are_naive(project: AmqTask, jobs: Any) -> None:
    from django.test import override_settings
    from django.utils import timezone as zones

    with override_settings(USE_TZ=False), start_worker(project):
        later = zones.make_naive(zones.now() if zones.is_aware(zones.now()) else zones.make_aware(zones.now()))
        result = ended(jobs.add.using(run_after=later).enqueue(1, 2), project)

    assert result.return_value == 3
    assert result.finished_at.tzinfo is result.started_at.tzinfo is result.enqueued_at.tzinfo is None
    assert result.started_at >= later
