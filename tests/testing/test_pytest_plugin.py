"""The pytest plugin, as users' projects use it; each run is a pytest of its own."""

from __future__ import annotations

import os

import pytest

pytest_plugins = ["pytester"]

PROJECT = """
from amqtask import AmqTask, shared_task

app = AmqTask("proj", broker="amqp://nobody:here@localhost:1//", backend="redis://localhost:1")

@app.task
def add(x, y):
    return x + y

@app.task
def fail():
    raise KeyError("gone")
"""
CONFIGURATION = """
[pytest]
amqtask_app = proj:app
"""


@pytest.fixture
def user(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A project folder with an application of its own."""
    for variable in [name for name in os.environ if name.startswith(("AMQTASK_", "CELERY_", "COV_"))]:
        monkeypatch.delenv(variable)
    pytester.makepyfile(proj=PROJECT)
    pytester.makeini(CONFIGURATION)
    return pytester


def run(user: pytest.Pytester, **outcomes: int) -> pytest.RunResult:
    result = user.runpytest_subprocess("-p", "no:cacheprovider", "--strict-markers", "-W", "error")
    result.assert_outcomes(**outcomes)
    return result


def test_a_worker_in_the_process_runs_the_projects_tasks(user: pytest.Pytester) -> None:
    user.makepyfile(
        """
        import proj, pytest

        def test_it_runs(amqtask_app, amqtask_worker):
            assert amqtask_app is proj.app
            assert proj.add.delay(2, 2).get(timeout=60) == 4
            with pytest.raises(KeyError):
                proj.fail.delay().get(timeout=60)

        def test_what_nobody_consumed_is_there_to_look_at(amqtask_app):
            proj.add.delay(1, 1)
            assert amqtask_app.memory_broker.count("amqtask") == 1

        def test_nothing_is_left_of_the_test_before(amqtask_app):
            proj.add.delay(1, 1)
            assert amqtask_app.memory_broker.count("amqtask") == 1

        def test_the_projects_own_settings_are_back():
            assert proj.app.conf.broker_url == "amqp://nobody:here@localhost:1//"
            assert not proj.app.conf.is_set("worker_concurrency")
            assert proj.app.memory_broker is None
        """
    )

    run(user, passed=4)


def test_eager_mode_ends_with_the_test(user: pytest.Pytester) -> None:
    user.makepyfile(
        """
        import proj

        def test_eager(amqtask_eager):
            result = proj.add.delay(2, 2)
            assert (result.get(), result.state) == (4, "SUCCESS")
            assert proj.fail.delay().state == "FAILURE"

        def test_not_eager():
            assert not proj.app.conf.task_always_eager
        """
    )

    run(user, passed=2)


def test_settings_from_conftest_and_marker(user: pytest.Pytester) -> None:
    user.makeconftest(
        """
        import pytest

        @pytest.fixture(scope="session")
        def amqtask_config():
            return {"task_default_queue": "from-conftest", "timezone": "Asia/Shanghai"}

        @pytest.fixture(scope="session")
        def amqtask_worker_options():
            return {"pool": "threads", "concurrency": 3}
        """
    )
    user.makepyfile(
        """
        import pytest

        pytestmark = pytest.mark.amqtask(task_default_queue="from-module", result_expires=5)

        def test_conftest(amqtask_app, amqtask_worker):
            assert amqtask_app.conf.timezone == "Asia/Shanghai"
            assert amqtask_worker.concurrency == 3

        @pytest.mark.amqtask(task_default_queue="from-test")
        def test_marker(amqtask_app):
            assert amqtask_app.conf.task_default_queue == "from-test"
            assert amqtask_app.conf.result_expires == 5
        """
    )

    run(user, passed=2)


def test_without_a_named_application_there_is_a_new_one_with_the_shared_tasks(user: pytest.Pytester) -> None:
    user.makeini("[pytest]")
    user.makepyfile(
        """
        from amqtask import shared_task

        @shared_task
        def whose():
            return "shared"

        def test_shared(amqtask_app, amqtask_worker):
            assert whose.delay().get(timeout=60) == "shared"
            assert amqtask_app.main == "tests"

        def test_one_of_the_tests_own(amqtask_app, amqtask_worker):
            @amqtask_app.task
            def mul(x, y):
                return x * y

            assert mul.delay(3, 3).get(timeout=60) == 9
        """
    )

    run(user, passed=2)


def test_an_application_that_cannot_be_found_is_named(user: pytest.Pytester) -> None:
    user.makeini("[pytest]\namqtask_app = porj:app")
    user.makepyfile("def test_it(amqtask_app): ...")

    result = run(user, errors=1)

    result.stdout.fnmatch_lines(
        ["*amqtask_app in pytest's configuration says 'porj:app', but there is no module 'porj'*"]
    )


def test_a_worker_process_wants_the_applications_name(user: pytest.Pytester) -> None:
    user.makeini("[pytest]")
    user.makepyfile("def test_it(amqtask_real_worker): ...")

    result = run(user, errors=1)

    result.stdout.fnmatch_lines(["*put amqtask_app = proj.celery:app into pytest's configuration*"])


@pytest.mark.parametrize(
    ("mark", "error"),
    [
        ("broker_url='memory://'", "*a worker process needs RabbitMQ*"),
        ("result_backend=None", "*this application keeps none: set result_backend*"),
        ("task_annotations={'*': object()}", "*setting task_annotations cannot be handed to a worker process*"),
    ],
)
def test_what_a_worker_process_cannot_do_is_said(user: pytest.Pytester, mark: str, error: str) -> None:
    user.makepyfile(f"import pytest\n@pytest.mark.amqtask({mark})\ndef test_it(amqtask_real_worker): ...")

    run(user, errors=1).stdout.fnmatch_lines([error])


def test_it_costs_nothing_where_it_is_not_used(user: pytest.Pytester) -> None:
    user.makepyfile(
        """
        import sys

        def test_nothing_was_imported():
            ours = sorted(name for name in sys.modules if name.partition(".")[0] in ("amqtask", "amqtask_pools", "pika"))
            assert [name for name in ours if not name.startswith("amqtask.ground")] == [
                "amqtask", "amqtask.testing", "amqtask.testing.pytest_plugin"
            ]
        """
    )

    run(user, passed=1)


def test_fixtures_under_celerys_names(user: pytest.Pytester) -> None:
    user.makeini("[pytest]")
    user.makeconftest(
        """
        import pytest

        pytest_plugins = ("amqtask.contrib.pytest",)

        @pytest.fixture(scope="session")
        def celery_config():
            return {"broker_url": "memory://", "result_backend": "cache+memory://", "task_default_queue": "celery"}

        @pytest.fixture(scope="session")
        def celery_parameters():
            return {"strict_typing": False}

        @pytest.fixture(scope="session")
        def celery_includes():
            return ["proj_tasks"]

        @pytest.fixture(scope="session")
        def celery_worker_parameters():
            return {
                "queues": "celery,other", "exclude_queues": ("other"), "perform_ping_check": False, "ping_task_timeout": 5,
                "shutdown_timeout": 5, "hostname": "mine@here", "task_events": True,
            }
        """
    )
    user.makepyfile(proj_tasks="from amqtask import shared_task\n@shared_task\ndef shared(): return 'here'")
    user.makepyfile(
        """
        import pytest

        def test_create_task(celery_app, celery_worker):
            @celery_app.task
            def mul(x, y):
                return x * y

            celery_worker.reload()
            assert mul.delay(4, 4).get(timeout=60) == 16
            assert celery_app.strict_typing is False
            assert celery_worker.hostname == "mine@here"
            assert [queue.name for queue in celery_worker.queues] == ["celery"]

        @pytest.mark.celery(timezone="Asia/Shanghai")
        def test_marker(celery_app):
            assert celery_app.conf.timezone == "Asia/Shanghai"
            assert celery_app.conf.task_default_queue == "celery"

        @pytest.mark.usefixtures("celery_session_app", "celery_session_worker")
        class TestSession:
            def test_one(self):
                from proj_tasks import shared
                assert shared.delay().get(timeout=60) == "here"

            def test_two(self):
                from proj_tasks import shared
                assert shared.delay().get(timeout=60) == "here"
        """
    )

    run(user, passed=4)
