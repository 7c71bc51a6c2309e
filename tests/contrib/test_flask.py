"""amqtask.contrib.flask, and the pattern that Flask's own documentation teaches."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, current_app, g

from amqtask import AmqTask as Application
from amqtask import AsyncResult, Task, shared_task
from amqtask.contrib.flask import AmqTask
from amqtask.exceptions import ConfigurationError
from amqtask.ground import current
from amqtask.testing.worker import start_worker

MEMORY = {"broker_url": "memory://", "result_backend": "cache+memory://"}


@pytest.fixture(autouse=True)
def no_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an application makes current, and shared tasks, end with the test."""
    monkeypatch.setattr(current, "_default", list(current._default))
    monkeypatch.setattr(current, "_shared", [])


class Shop:
    """A Flask app with tasks, and what happened to its contexts."""

    def __init__(self, tasks: AmqTask | None = None) -> None:
        self.flask = Flask("shop")
        self.flask.config["AMQTASK"] = MEMORY
        self.ended: list[Any] = []
        self.flask.teardown_appcontext(lambda error: self.ended.append(type(error).__name__ if error else None))
        self.tasks = tasks or AmqTask(set_as_current=False)
        self.tasks.init_app(self.flask)


@pytest.fixture
def shop() -> Iterator[Shop]:
    made = Shop()
    yield made
    made.tasks.close()


@pytest.mark.parametrize("pool", ["solo", "threads", "asyncio"])
def test_each_task_has_an_application_context_of_its_own(shop: Shop, pool: str) -> None:
    @shop.tasks.task
    def note(value: int) -> list[Any]:
        before = g.get("value")
        g.value = value
        return [current_app.name, before]

    @shop.tasks.task
    async def anote(value: int) -> list[Any]:
        before = g.get("value")
        g.value = value
        return [current_app.name, before]

    with start_worker(shop.tasks, pool=pool, concurrency=2):
        results = [note.delay(1), note.delay(2), anote.delay(3), anote.delay(4)]
        assert [result.get(timeout=60) for result in results] == [["shop", None]] * 4

    assert shop.ended == [None] * 4


def test_the_context_is_torn_down_with_the_error(shop: Shop) -> None:
    @shop.tasks.task
    def fail() -> None:
        raise KeyError("gone")

    with start_worker(shop.tasks), pytest.raises(KeyError):
        fail.delay().get(timeout=60)

    assert shop.ended == ["KeyError"]


def test_bound_and_class_based_tasks_and_those_with_a_base_have_it_too(shop: Shop) -> None:
    class Named(Task[Any, Any]):
        abstract = True

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return f"named: {self.run(*args, **kwargs)}"

    class ByClass(Task[Any, Any]):
        name = "by_class"

        def run(self, number: int) -> str:
            return f"{current_app.name} {number}"

    @shop.tasks.task(bind=True, base=Named)
    def bound(self: Any, number: int) -> str:
        return f"{current_app.name} {number} {self.request.id is not None}"

    by_class = shop.tasks.register_task(ByClass)
    with start_worker(shop.tasks):
        assert bound.delay(1).get(timeout=60) == "named: shop 1 True"
        assert by_class.delay(2).get(timeout=60) == "shop 2"
    with pytest.raises(TypeError, match="cannot be called like that"):
        bound.delay()  # type: ignore[call-arg]


def test_a_shared_task_runs_in_the_context(shop: Shop) -> None:
    @shared_task
    def whose() -> str:
        return current_app.name

    shop.tasks.set_current()
    with start_worker(shop.tasks):
        assert whose.delay().get(timeout=60) == "shop"


def test_called_in_a_request_as_a_function_or_eagerly(shop: Shop) -> None:
    @shop.tasks.task
    def add(x: int, y: int) -> str:
        return f"{current_app.name} {x + y} {'seen' in g}"

    @shop.flask.get("/")
    def view() -> list[str]:
        g.seen = True
        return [add(1, 1), add.apply((2, 2)).get()]

    assert shop.flask.test_client().get("/").json == ["shop 2 False", "shop 4 False"]


def test_the_configuration_in_all_its_spellings() -> None:
    flask = Flask("shop")
    tasks = AmqTask(flask, set_as_current=False, worker_concurrency=1, timezone="UTC")
    flask.config.update(
        CELERY={"broker_url": "memory://", "task_default_queue": "a", "timezone": "Asia/Shanghai"},
        CELERY_TASK_DEFAULT_QUEUE="b",
        CELERY_RESULT_BACKEND="cache+memory://",
        CELERYD_PREFETCH_MULTIPLIER=3,
        AMQTASK={"worker_concurrency": 7},
        AMQTASK_TASK_DEFAULT_QUEUE="c",
        SQLALCHEMY_DATABASE_URI="sqlite://",
    )

    conf = tasks.conf

    assert (conf.broker_url, conf.result_backend) == ("memory://", "cache+memory://")
    assert (conf.task_default_queue, conf.worker_prefetch_multiplier, conf.worker_concurrency) == ("c", 3, 7)
    assert conf.timezone == "Asia/Shanghai"


@pytest.mark.parametrize("config", [{"AMQTASK": {"broker_ulr": "x"}}, {"AMQTASK_BROKER_ULR": "x"}])
def test_a_misspelt_setting_is_named(config: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    flask = Flask("shop")
    flask.config.update(config)
    tasks = AmqTask(flask, set_as_current=False)

    assert tasks.conf.broker_url is None
    assert "did you mean broker_url?" in caplog.text


def test_a_factory_may_be_called_again_and_leaves_no_settings_behind() -> None:
    tasks = AmqTask(set_as_current=False)

    @tasks.task
    def whose() -> str:
        return str(current_app.config["NAME"])

    for name, more in (("one", {"task_default_queue": "only-here"}), ("two", {})):
        flask = Flask(name)
        flask.config.update(NAME=name, AMQTASK={**MEMORY, **more})
        tasks.init_app(flask)
        with start_worker(tasks):
            assert whose.delay().get(timeout=60) == name
    assert tasks.conf.task_default_queue == "amqtask"
    tasks.close()


def test_without_a_flask_app_nothing_is_published_to_nowhere() -> None:
    tasks = AmqTask(set_as_current=False)
    task = tasks.task(lambda: None)

    with pytest.raises(ConfigurationError, match=r"call init_app\(app\)"):
        task.delay()


# -- Flask's documentation, "Background Tasks with Celery": the same with `Celery` replaced by `AmqTask`


def celery_init_app(app: Flask) -> Application:
    class FlaskTask(Task[Any, Any]):
        def __call__(self, *args: object, **kwargs: object) -> object:
            with app.app_context():
                return self.run(*args, **kwargs)

    celery_app = Application(app.name, task_cls=FlaskTask)
    celery_app.config_from_object(app.config["CELERY"])
    celery_app.set_default()
    app.extensions["celery"] = celery_app
    return celery_app


def create_app() -> Flask:
    app = Flask(__name__)
    app.config.from_mapping(CELERY={**MEMORY, "task_ignore_result": True})
    app.config.from_prefixed_env()
    celery_init_app(app)
    return app


@shared_task(ignore_result=False)
def add_together(a: int, b: int) -> int:
    return a + b + len(current_app.name) - len(__name__)


def test_the_pattern_of_flasks_documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(current, "_shared", [add_together._make])  # type: ignore[attr-defined]
    app = create_app()
    celery_app = app.extensions["celery"]

    @app.post("/add")
    def start_add() -> dict[str, object]:
        return {"result_id": add_together.delay(23, 42).id}

    @app.get("/result/<id>")
    def task_result(id: str) -> dict[str, object]:
        result: AsyncResult[int] = AsyncResult(id)
        return {
            "ready": result.ready(),
            "successful": result.successful(),
            "value": result.result if result.ready() else None,
        }

    client = app.test_client()
    task_id = client.post("/add").json["result_id"]  # type: ignore[index]
    assert client.get(f"/result/{task_id}").json == {"ready": False, "successful": False, "value": None}
    with start_worker(celery_app):
        AsyncResult(task_id).get(timeout=60)
    assert client.get(f"/result/{task_id}").json == {"ready": True, "successful": True, "value": 65}


def make_celery(app: Flask) -> Application:
    """The older pattern, of Flask 1's documentation and most tutorials."""
    celery = Application(
        app.import_name, backend=app.config["CELERY_RESULT_BACKEND"], broker=app.config["CELERY_BROKER_URL"]
    )
    celery.conf.update(app.config)

    class ContextTask(celery.Task):  # type: ignore[misc, name-defined]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with app.app_context():
                return self.run(*args, **kwargs)

    celery.Task = ContextTask
    return celery


def test_the_pattern_of_older_tutorials() -> None:
    flask_app = Flask("shop")
    flask_app.config.update(CELERY_BROKER_URL="memory://", CELERY_RESULT_BACKEND="cache+memory://", SECRET_KEY="x")
    celery = make_celery(flask_app)

    @celery.task()
    def whose() -> str:
        return current_app.name

    with start_worker(celery):
        assert whose.delay().get(timeout=60) == "shop"


# -- the command line

FACTORY = """
from flask import Flask
from amqtask.contrib.flask import AmqTask

tasks = AmqTask()

@tasks.task
def add(x, y):
    return x + y

def create_app():
    app = Flask(__name__)
    app.config["AMQTASK"] = {"broker_url": "memory://"}
    tasks.init_app(app)
    return app
"""
PATTERN = """
from flask import Flask
from amqtask import AmqTask

app = Flask(__name__)
app.extensions["celery"] = AmqTask("shop", broker="memory://")

@app.extensions["celery"].task
def add(x, y):
    return x + y
"""


def run(folder: Path, program: str, *arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [str(Path(sys.executable).parent / program), *arguments],
        cwd=folder,
        env={key: value for key, value in os.environ.items() if not key.startswith(("FLASK_", "AMQTASK_"))},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("source", [FACTORY, PATTERN], ids=["factory", "pattern"])
def test_the_whole_command_line_is_a_command_of_flasks(tmp_path: Path, source: str) -> None:
    (tmp_path / "shop.py").write_text(source)

    code, text = run(tmp_path, "flask", "--app", "shop", "amqtask", "list", "tasks")
    assert (code, "shop.add" in text) == (0, True), text
    code, text = run(tmp_path, "flask", "--app", "shop", "amqtask", "worker", "--help")
    assert (code, "--concurrency" in text) == (0, True), text
    code, text = run(tmp_path, "flask", "--app", "shop", "amqtask", "wroker")
    assert (code, "Did you mean 'worker'" in text) == (2, True), text


@pytest.mark.parametrize(("source", "name"), [(FACTORY, "shop:create_app"), (PATTERN, "shop"), (PATTERN, "shop:app")])
def test_our_command_line_takes_a_flask_app_or_its_factory(tmp_path: Path, source: str, name: str) -> None:
    (tmp_path / "shop.py").write_text(source)

    code, text = run(tmp_path, "amqtask", "-A", name, "list", "tasks")

    assert (code, "shop.add" in text) == (0, True), text


def test_what_flasks_command_line_cannot_do_is_said(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text("from flask import Flask\napp = Flask(__name__)\n")

    code, text = run(tmp_path, "flask", "--app", "shop", "amqtask", "list", "tasks")
    assert (code, "'shop' has no amqtask application" in text) == (2, True), text
    code, text = run(tmp_path, "flask", "--app", "shop", "amqtask", "worker", "-P", "eventlet")
    assert (code, "amqtask -A module:create_app worker -P eventlet" in text) == (2, True), text
    code, text = run(tmp_path, "amqtask", "-A", "shop:app", "list", "tasks")
    assert code == 1
    assert "is a Flask, not an AmqTask application" in text
