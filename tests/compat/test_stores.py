"""Result stores written for Celery are stores here, and ours answer to the names of Celery's."""

from __future__ import annotations

import importlib
import json
import os
import pickle
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from amqtask import AmqTask, chord, group, states
from amqtask.backends.contract import ResultBackend
from amqtask.compat.backends.base import BaseDictBackend, KeyValueStoreBackend
from amqtask.exceptions import BackendUnreachable, ConfigurationError, TaskRevokedError, TimeoutError
from amqtask.result import AsyncResult, GroupResult
from amqtask.testing.suites.backend import BackendSuite
from amqtask.testing.worker import start_worker

HERE = __name__


class Files(KeyValueStoreBackend):
    """Keys and values as a library would keep them somewhere: here each in a file, in the folder that the URL names."""

    key_t = str

    @property
    def folder(self) -> Path:
        return Path((self.url or "").removeprefix("files://"))

    def get(self, key: str) -> Any:
        path = self.folder / key
        return path.read_text() if path.exists() else None

    def set(self, key: str, value: Any) -> None:
        new = self.folder / f"{key}.{os.getpid()}.{id(value)}"
        new.write_text(value)
        new.rename(self.folder / key)

    def delete(self, key: str) -> None:
        (self.folder / key).unlink(missing_ok=True)


class Rows(BaseDictBackend):
    """The other kind: it is told of results, not of keys."""

    rows: dict[str, dict[str, Any]] = {}  # noqa: RUF012 - a table
    requests: list[Any] = []  # noqa: RUF012
    cleanups: list[int] = []  # noqa: RUF012

    def process_cleanup(self) -> None:
        self.cleanups.append(1)

    def _store_result(
        self, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None, **kwargs: Any
    ) -> Any:
        self.requests.append(request)
        self.rows[task_id] = {
            "status": state,
            "result": self.encode(result),
            "traceback": traceback,
            "date_done": self.app.now(),
            "children": self.current_task_children(request),
        }
        return result

    def _get_task_meta_for(self, task_id: str) -> dict[str, Any]:
        row = self.rows.get(task_id)
        if row is None:
            return {"status": states.PENDING, "result": None}
        meta: dict[str, Any] = self.meta_from_decoded({**row, "result": self.decode(row["result"])})
        return meta

    def _forget(self, task_id: str) -> None:
        self.rows.pop(task_id, None)


class Away(Files):
    def get(self, key: str) -> Any:
        raise OSError("the server does not answer")


def make_app(backend: str, **settings: Any) -> AmqTask:
    return AmqTask("stores", broker="memory://", result_backend=backend, set_as_current=False, **settings)


class TestStoreOfKeysAndValues(BackendSuite):
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path) -> None:
        self.path = tmp_path

    def make(self) -> ResultBackend:
        made: Any = make_app(f"{HERE}:Files+files://{self.path}", result_extended=True).backend
        return made  # type: ignore[no-any-return]

    def make_unreachable(self) -> ResultBackend | None:
        return make_app(f"{HERE}:Away+files://:secret@nowhere").backend

    def test_of_many_that_store_at_once_the_success_stays(self, backend: ResultBackend) -> None:
        pytest.skip("it looks, and then writes, as Celery's do")


@pytest.fixture
def rows() -> Iterator[Any]:
    with AmqTask("rows", broker="memory://", result_backend=f"{HERE}.Rows", result_extended=True) as app:
        yield app
    Rows.rows.clear()
    Rows.requests.clear()
    Rows.cleanups.clear()


def test_a_worker_s_results_are_kept_in_a_class_that_the_setting_names(rows: Any) -> None:
    add = rows.task(name="add")(lambda x, y: x + y)
    divide = rows.task(name="divide")(lambda x, y: x / y)

    with start_worker(rows, pool="threads"):
        done, failed = add.delay(1, 2), divide.delay(1, 0)
        assert done.get(60) == 3
        with pytest.raises(ZeroDivisionError):
            failed.get(60)

    assert isinstance(rows.backend, Rows)
    assert Rows.rows[done.id]["status"] == states.SUCCESS
    assert "ZeroDivisionError" in Rows.rows[failed.id]["traceback"]
    assert len(Rows.cleanups) == 2
    request = next(request for request in Rows.requests if request.id == done.id)
    assert (request.task, list(request.args), request.delivery_info["routing_key"]) == ("add", [1, 2], "amqtask")
    failed.forget()
    assert failed.id not in Rows.rows


def test_groups_and_chords_work_with_a_store_of_keys(tmp_path: Path) -> None:
    with AmqTask("keys", broker="memory://", result_backend=f"{HERE}:Files+files://{tmp_path}") as app:
        add = app.task(name="add")(lambda x, y: x + y)
        total = app.task(name="total")(sum)
        with start_worker(app, pool="threads"):
            assert chord([add.s(1, 1), add.s(2, 2)], total.s())().get(60) == 6
            results = group(add.s(n, n) for n in range(3))()
            results.save()
            kept = GroupResult.restore(results.id)
            assert kept == results
            assert kept is not None
            assert kept.get(60) == [0, 2, 4]
            kept.delete()
            assert GroupResult.restore(results.id) is None


def test_a_store_that_fails_is_a_named_error(tmp_path: Path) -> None:
    backend: Any = make_app(f"{HERE}:Away+files://{tmp_path}").backend

    with pytest.raises(BackendUnreachable, match="Away cannot be asked for results"):
        backend.find("it")
    with pytest.raises(OSError, match="does not answer"):
        backend.get_state("it")


def test_another_attempt_is_made_where_the_store_says_that_it_may_help(tmp_path: Path) -> None:
    class Shaky(Files):
        failures = 2

        def get(self, key: str) -> Any:
            self.failures -= 1
            if self.failures >= 0:
                raise OSError("for a moment")
            return super().get(key)

        def exception_safe_to_retry(self, exc: BaseException) -> bool:
            return isinstance(exc, OSError)

    app = make_app("disabled", result_backend_always_retry=True, result_backend_base_sleep_between_retries_ms=1)
    assert Shaky(app=app, url=f"files://{tmp_path}").get_state("it") == states.PENDING


def test_a_store_that_stays_away_is_asked_so_often_and_no_more(tmp_path: Path) -> None:
    class Gone(Away):
        hooks: list[BaseException] = []  # noqa: RUF012

        def exception_safe_to_retry(self, exc: BaseException) -> bool:
            return True

        def on_backend_retryable_error(self, exc: BaseException) -> None:
            self.hooks.append(exc)
            raise ValueError("a hook that fails")

    app = make_app(
        "disabled",
        result_backend_always_retry=True,
        result_backend_max_retries=3,
        result_backend_base_sleep_between_retries_ms=1,
    )
    store = Gone(app=app, url=f"files://{tmp_path}")

    with pytest.raises(BackendUnreachable, match="failed to store result") as raised:
        store.mark_as_done("it", 1)
    assert (raised.value.task_id, raised.value.state, len(store.hooks)) == ("it", states.SUCCESS, 3)
    assert isinstance(raised.value.__cause__, OSError)


def test_keys_and_values_are_celery_s(tmp_path: Path) -> None:
    app = make_app("disabled", result_backend_transport_options={"global_keyprefix": "shop"})
    store = Files(app=app, url=f"files://{tmp_path}", expires=timedelta(seconds=9))

    store.mark_as_done("it", {"x": 1})
    store.mark_as_done("it", "later")

    kept = json.loads((tmp_path / "shop_celery-task-meta-it").read_text())
    assert (kept["status"], kept["result"], kept["task_id"]) == (states.SUCCESS, {"x": 1}, "it")
    assert (store.get_key_for_task("it"), store.expires) == ("shop_celery-task-meta-it", 9)


def test_exceptions_are_data_but_with_pickle(tmp_path: Path) -> None:
    app = make_app("disabled", accept_content=["json", "pickle"])
    as_data, pickled = Files(app=app, url="files://"), Files(app=app, serializer="pickle", url="files://")

    assert as_data.prepare_exception(KeyError("k"))["exc_type"] == "KeyError"
    assert isinstance(as_data.exception_to_python(as_data.prepare_exception(KeyError("k"))), KeyError)
    assert isinstance(pickled.prepare_exception(KeyError("k")), KeyError)
    assert pickled.decode(pickled.encode({"x": KeyError("k")}))["x"].args == ("k",)


def test_a_store_can_be_pickled_for_the_current_application(tmp_path: Path) -> None:
    with AmqTask("current", broker="memory://") as app:
        again = pickle.loads(pickle.dumps(Rows(app=app)))

    assert isinstance(again, Rows)
    assert again.app is app


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (f"{HERE}:Nothing", "cannot be imported"),
        ("nowhere.at_all:Store", "cannot be imported"),
        ("amqtask.app:AmqTask", "no result store"),
    ],
)
def test_a_class_that_is_no_store_is_an_error_that_says_what_to_do(name: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        _ = make_app(name).backend


def test_a_class_is_found_by_celery_s_functions() -> None:
    backends = importlib.import_module("amqtask.app.backends")

    assert backends.by_name(f"{HERE}:Rows") is Rows
    assert backends.by_url(f"{HERE}:Rows+rows://there") == (Rows, "rows://there")
    assert backends.by_url("cache+memory://")[1] == "cache+memory://"


# -- ours under Celery's names


@pytest.fixture
def ours() -> Iterator[Any]:
    with AmqTask("ours", broker="memory://", backend="cache+memory://") as app:
        yield app


def test_what_became_of_a_task_is_told_to_our_stores_as_to_celery_s(ours: Any) -> None:
    store = ours.backend

    store.mark_as_started("a", pid=1)
    assert (store.get_state("a"), store.get_result("a")) == (states.STARTED, {"pid": 1})
    store.mark_as_done("a", 42)
    store.mark_as_failure("b", KeyError("k"), traceback="where")
    store.mark_as_retry("c", ValueError("again"))
    store.mark_as_revoked("d", "not wanted")
    store.store_result("e", {"done": 50}, "PROGRESS")

    assert store.get_task_meta("a")["result"] == 42
    assert isinstance(store.get_result("b"), KeyError)
    assert store.get_traceback("b") == "where"
    assert [store.get_status(task_id) for task_id in "cdex"] == ["RETRY", "REVOKED", "PROGRESS", "PENDING"]
    assert AsyncResult("e", store).info == {"done": 50}
    with pytest.raises(TaskRevokedError):
        AsyncResult("d", store).get()
    assert (store.task_result_exists("e"), store.task_result_exists("x")) == (True, False)


def test_our_stores_are_waited_for_as_celery_s(ours: Any) -> None:
    store = ours.backend
    store.mark_as_done("a", 1)
    store.mark_as_failure("b", KeyError("k"))

    assert store.wait_for("a")["result"] == 1
    assert {task_id: meta["status"] for task_id, meta in store.get_many(["a", "b"])} == {"a": "SUCCESS", "b": "FAILURE"}
    with pytest.raises(TimeoutError):
        store.wait_for("x", timeout=0.01)
    store.ensure_chords_allowed()
    assert (store.as_uri(), store.serializer) == ("cache+memory://", "json")


def test_a_failure_that_is_told_by_hand_ends_the_chain_and_publishes_the_errbacks(ours: Any) -> None:
    ours.task(name="tell")(lambda task_id: None)
    request = importlib.import_module("amqtask.app.task").Context(
        {"id": "a", "errbacks": [ours.signature("tell")], "chain": [{"task": "t", "options": {"task_id": "next"}}]}
    )

    ours.backend.mark_as_failure("a", KeyError("k"), request=request)

    assert ours.backend.get_state("next") == states.FAILURE
    ((properties, body),) = ours.memory_broker.messages("amqtask")
    assert (properties.headers["task"], json.loads(body)[0]) == ("tell", ["a"])
    try:
        raise ValueError("now")
    except ValueError:
        info = ours.backend.fail_from_current_stack("b")
    assert (info.type, ours.backend.get_state("b")) == (ValueError, states.FAILURE)


def test_what_no_store_has_is_still_an_attribute_error(ours: Any) -> None:
    with pytest.raises(AttributeError, match="'MemoryBackend' object has no attribute 'client'"):
        _ = ours.backend.client


def test_results_answer_to_more_of_celery_s_names(ours: Any) -> None:
    ours.backend.mark_as_failure("a", KeyError("k"))
    failed: Any = AsyncResult("a")
    several: Any = GroupResult("g", [failed], app=ours)

    meta = failed._get_task_meta()
    assert (meta["status"], type(meta["result"]), meta["task_id"]) == (states.FAILURE, KeyError, "a")
    assert ours.AsyncResult("x")._get_task_meta()["status"] == states.PENDING
    assert (failed.exists(), ours.AsyncResult("x").exists()) == (True, False)
    with pytest.raises(KeyError):
        failed.throw()
    assert list(several._failed_join_report()) == [failed]
    assert (failed.supports_native_join, several.supports_native_join, several.app) == (False, False, ours)
    assert several == GroupResult("g", [failed])
    assert several == "g"
    assert several != GroupResult("h", [failed])
