"""Tasks run in their caller: apply, task_always_eager, retries, callbacks, hooks."""

from __future__ import annotations

import asyncio
import copy
import pickle
from typing import Any
from unittest import mock

import pytest
from pydantic import BaseModel

from amqtask import AmqTask, Task, chain, group, shared_task, signals
from amqtask.exceptions import EncodeError, MaxRetriesExceededError, Retry, UnknownTaskOptionWarning
from amqtask.ground import current
from amqtask.testing.worker import start_worker


@pytest.fixture
def app() -> AmqTask:
    """An app that runs everything in the caller."""
    return AmqTask("tests", task_always_eager=True)


def test_apply_runs_the_task_and_keeps_its_value(app: AmqTask) -> None:
    @app.task
    def add(x: int, y: int) -> int:
        return x + y

    result = add.apply((2, 3))

    assert result.get() == 5
    assert result.state == "SUCCESS"


def test_eager_delay_keeps_the_error_until_it_is_asked_for(app: AmqTask) -> None:
    @app.task
    def fail() -> None:
        raise ValueError("as told")

    result = fail.delay()

    assert result.failed()
    with pytest.raises(ValueError, match="as told"):
        result.get()


def test_eager_errors_propagate_when_the_setting_says_so(app: AmqTask) -> None:
    app.conf.task_eager_propagates = True

    @app.task
    def fail() -> None:
        raise ValueError("as told")

    with pytest.raises(ValueError, match="as told"):
        fail.delay()


@pytest.mark.parametrize("eager", [False, True])
def test_apply_raises_when_the_setting_or_the_call_says_so(app: AmqTask, eager: bool) -> None:
    app.conf.update(task_always_eager=eager, task_eager_propagates=True)

    @app.task
    def fail() -> None:
        raise ValueError("as told")

    for call in (fail.apply, chain(fail.si(), fail.si()).apply, group(fail.si(), fail.si()).apply):
        with pytest.raises(ValueError, match="as told"):
            call()
    assert fail.apply(throw=False).failed()
    app.conf.task_eager_propagates = False
    assert fail.apply().failed()


def test_async_tasks_run_inline_too(app: AmqTask) -> None:
    @app.task
    async def double(x: int) -> int:
        return 2 * x

    assert double.delay(4).get() == 8


def test_a_bound_task_sees_its_request(app: AmqTask) -> None:
    @app.task(bind=True)
    def who(self: Any) -> tuple[str, int, bool]:
        return self.request.id, self.request.retries, self.request.is_eager

    assert who.apply(task_id="mine").get() == ("mine", 0, True)


def test_a_task_that_runs_inline_sees_so_and_its_stamps(app: AmqTask) -> None:
    @app.task(bind=True)
    def seen(self: Any) -> Any:
        info = self.request.delivery_info
        return info["is_eager"], info["exchange"], info["routing_key"], info["priority"], self.request.stamps

    sig = seen.s()
    sig.stamp(customer="7")

    assert sig.apply().get() == sig.delay().get() == (True, None, None, None, {"customer": "7"})


def test_retry_runs_again_until_it_succeeds(app: AmqTask) -> None:
    seen: list[int] = []

    @app.task(bind=True, max_retries=3)
    def flaky(self: Any) -> str:
        seen.append(self.request.retries)
        if self.request.retries < 2:
            raise self.retry(exc=RuntimeError("not yet"), countdown=0)
        return "done"

    assert flaky.delay().get() == "done"
    assert seen == [0, 1, 2]


def test_retry_past_its_limit_raises_the_cause(app: AmqTask) -> None:
    @app.task(bind=True, max_retries=1)
    def hopeless(self: Any) -> None:
        raise self.retry(exc=RuntimeError("never"), countdown=0)

    with pytest.raises(RuntimeError, match="never"):
        hopeless.delay().get()


def test_retry_past_its_limit_without_a_cause_says_so(app: AmqTask) -> None:
    @app.task(bind=True, max_retries=0)
    def hopeless(self: Any) -> None:
        raise self.retry(countdown=0)

    with pytest.raises(MaxRetriesExceededError, match="hopeless"):
        hopeless.delay().get()


def test_retry_outside_of_a_run_raises_the_cause(app: AmqTask) -> None:
    @app.task(bind=True)
    def task(self: Any) -> None:
        raise self.retry(exc=KeyError("x"))

    with pytest.raises(KeyError):
        task()
    assert issubclass(Retry, Exception)


def test_autoretry_for_retries_listed_errors_only(app: AmqTask) -> None:
    runs: list[str] = []

    @app.task(autoretry_for=(OSError,), dont_autoretry_for=(PermissionError,), max_retries=2, default_retry_delay=0)
    def fetch(kind: str) -> None:
        runs.append(kind)
        raise {"os": OSError, "permission": PermissionError, "value": ValueError}[kind]()

    for kind in ("os", "permission", "value"):
        assert fetch.delay(kind).failed()
    assert runs == ["os", "os", "os", "permission", "value"]


def test_hooks_of_a_base_class_are_called(app: AmqTask) -> None:
    told: list[str] = []

    class Telling(Task[..., Any]):
        def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
            told.append("before")

        def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
            told.append(f"success {retval}")

        def on_failure(self, exc: BaseException, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
            told.append(f"failure {exc}")

        def after_return(self, status: str, *rest: Any) -> None:
            told.append(f"after {status}")

    @app.task(base=Telling)
    def half(x: int) -> float:
        return 1 / x

    half.delay(2)
    half.delay(0)

    assert told == ["before", "success 0.5", "after SUCCESS", "before", "failure division by zero", "after FAILURE"]


def test_link_runs_with_the_result_and_link_error_with_the_id(app: AmqTask) -> None:
    seen: list[Any] = []

    @app.task
    def half(x: int) -> float:
        return 1 / x

    @app.task
    def note(value: Any) -> None:
        seen.append(value)

    half.apply_async((2,), link=note.s())
    half.apply_async((0,), task_id="broken", link_error=note.s())

    assert seen == [0.5, "broken"]


def test_chain_and_group_run_inline(app: AmqTask) -> None:
    @app.task
    def add(x: int, y: int) -> int:
        return x + y

    assert chain(add.s(1, 2), add.s(3), add.s(4)).apply().get() == 10
    assert (add.s(1, 2) | add.s(3)).apply().get() == 6
    assert group(add.s(n, n) for n in range(3)).apply().get() == [0, 2, 4]


def test_an_awaited_group_runs_inline_too(app: AmqTask) -> None:
    @app.task
    def double(x: int) -> int:
        return 2 * x

    results = asyncio.run(group(double.s(n) for n in range(3)).aapply_async())

    assert results.get() == [0, 2, 4]


def test_an_immutable_signature_ignores_its_parent(app: AmqTask) -> None:
    @app.task
    def add(x: int, y: int) -> int:
        return x + y

    assert chain(add.s(1, 2), add.si(10, 10)).apply().get() == 20


def test_wrong_arguments_are_a_type_error_that_names_the_task(app: AmqTask) -> None:
    @app.task
    def add(x: int, y: int) -> int:
        return x + y

    with pytest.raises(TypeError, match=r"tests\.app.*add"):
        add.delay(1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="no option 'que'"):
        AmqTask("other", set_as_current=False).send_task("x", que="y")


def test_class_based_tasks_are_registered(app: AmqTask) -> None:
    class Add(Task[..., int]):
        name = "tests.Add"

        def run(self, x: int, y: int) -> int:
            return x + y

    add = app.register_task(Add())

    assert add.delay(2, 2).get() == 4
    assert app.tasks["tests.Add"] is add


def test_a_shared_task_belongs_to_the_current_app(app: AmqTask) -> None:
    @shared_task
    def shared_add(x: int, y: int) -> int:
        return x + y

    assert shared_add.delay(1, 1).get() == 2
    assert shared_add.name in app.tasks


def test_a_shared_task_is_one_to_look_at_and_to_change(app: AmqTask, monkeypatch: pytest.MonkeyPatch) -> None:
    @shared_task(bind=True)
    def changed(self: Any) -> Any:
        return self.retry()

    task: Any = changed
    assert isinstance(task, Task)
    assert copy.copy(task) is pickle.loads(pickle.dumps(task)) is app.tasks[task.name]
    with mock.patch.object(task, "retry", return_value="replaced") as retry:
        assert task() == "replaced"
        retry.assert_called_once_with()
    with pytest.raises(Retry):
        task()
    monkeypatch.setattr(task, "max_retries", 7)
    assert app.tasks[task.name].max_retries == 7
    monkeypatch.undo()
    assert app.tasks[task.name].max_retries == 3


def test_what_is_set_on_a_shared_task_before_there_is_an_application_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(current, "_default", [])

    @shared_task
    def early() -> None: ...

    task: Any = early
    assert isinstance(task, Task)
    task.max_retries = 9
    assert current.find_current_app() is None

    assert AmqTask("late").tasks[task.name].max_retries == 9


def test_task_signals_are_sent_with_celerys_arguments(app: AmqTask) -> None:
    seen: list[tuple[str, Any]] = []

    @app.task(name="signalled")
    def task() -> int:
        return 7

    def before(sender: Any, task_id: str, **_: Any) -> None:
        seen.append(("prerun", sender.name))

    def after(sender: Any, retval: Any, state: str, **_: Any) -> None:
        seen.append((state, retval))

    signals.task_prerun.connect(before, sender="signalled")
    signals.task_postrun.connect(after, sender="signalled")
    try:
        task.delay()
    finally:
        signals.task_prerun.disconnect(before, sender="signalled")
        signals.task_postrun.disconnect(after, sender="signalled")

    assert seen == [("prerun", "signalled"), ("SUCCESS", 7)]


def test_an_option_that_is_nearly_one_of_ours_is_warned_of(app: AmqTask) -> None:
    with pytest.warns(UnknownTaskOptionWarning, match="'max_retry' is not an option.*'max_retries'"):

        @app.task(max_retry=3)
        def task() -> None: ...


def test_options_of_an_application_or_a_library_are_kept_on_the_task(app: AmqTask) -> None:
    class Once(Task[..., Any]):
        once: dict[str, Any] = {}  # noqa: RUF012

        def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
            return super().apply_async(args, kwargs, **options), options.get("once", self.once)

    @app.task(base=Once, bind=True, title="Sum", once={"timeout": 3})
    def add(self: Any, x: int, y: int) -> str:
        return f"{self.title} {x + y}"

    @shared_task(description="shared")
    def shared() -> None: ...

    task: Any = add
    assert (task.title, task.once) == ("Sum", {"timeout": 3})
    result, once = task.apply_async((1, 1), once={"timeout": 4})
    assert (result.get(), once) == ("Sum 2", {"timeout": 4})
    assert getattr(app.tasks[shared.name], "description", None) == "shared"


def test_names_come_from_module_and_function() -> None:
    app = AmqTask("proj", set_as_current=False)

    assert app.gen_task_name("f", "pkg.mod") == "pkg.mod.f"
    assert app.gen_task_name("f", "__main__") == "proj.f"


class Box(BaseModel):
    """A model."""

    size: int


def _grow(box: Box) -> Box:
    return Box(size=box.size + 1)


@pytest.mark.parametrize("call", [{"args": (Box(size=3),)}, {"kwargs": {"box": Box(size=3)}}])
def test_a_call_of_a_pydantic_task_may_be_given_models(call: dict[str, Any]) -> None:
    app = AmqTask("models", broker="memory://", backend="cache+memory://")
    grow: Any = app.task(name="grow", pydantic=True)(_grow)
    plain: Any = app.task(name="plain")(_grow)

    with start_worker(app):
        assert grow.apply_async(**call).get(timeout=60) == {"size": 4}
        assert grow.signature(**call).apply_async().get(timeout=60) == {"size": 4}
        with pytest.raises(EncodeError, match="task plain: argument"):
            plain.apply_async(**call)
    app.conf.task_always_eager = True
    assert grow.apply_async(**call).get() == {"size": 4}


def test_pydantic_models_are_validated_and_dumped(app: AmqTask) -> None:
    grow: Any = app.task(pydantic=True)(_grow)

    assert grow.delay({"size": "3"}).get() == {"size": 4}


def test_annotations_change_a_tasks_options() -> None:
    app = AmqTask("annotated", set_as_current=False, task_annotations={"slow": {"rate_limit": "1/s"}})

    @app.task(name="slow")
    def slow() -> None: ...

    app.finalize()

    assert slow.rate_limit == "1/s"
