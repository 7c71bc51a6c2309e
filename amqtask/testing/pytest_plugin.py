"""Fixtures for users' tests: an application, eager mode, a worker in this process, a worker process.

Every pytest run where amqtask is installed imports this module, so it imports nothing of amqtask's until a fixture is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.ground.shapes import OptionDict, SettingDict
    from amqtask.testing.process import RealWorker
    from amqtask.worker.worker import Worker

MARKER = "amqtask(**settings): settings of the application in this test (amqtask_app, amqtask_worker, amqtask_real_worker …)."


def pytest_addoption(parser: pytest.Parser) -> None:
    """`amqtask_app = proj.celery:app` in pytest's configuration."""
    parser.addini("amqtask_app", "The application under test, as after `amqtask -A` (default: a new one).", default="")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line("markers", MARKER)


@pytest.fixture(scope="session")
def amqtask_config() -> SettingDict:
    """Settings of the application in all tests; override it in conftest.py."""
    return {}


@pytest.fixture(scope="session")
def amqtask_worker_options() -> OptionDict:
    """Options of `amqtask_worker` and `amqtask_real_worker`: pool, concurrency, queues, timeout; override it in conftest.py."""
    return {}


@pytest.fixture
def amqtask_app(request: pytest.FixtureRequest, amqtask_config: SettingDict) -> Iterator[AmqTask]:
    """The application that the option `amqtask_app` names, or a new one, on a broker and result store in this process."""
    from amqtask.testing import apps

    name = request.config.getini("amqtask_app")
    app = apps.load(name) if name else apps.new()
    with apps.in_memory(app, {**amqtask_config, **_marked(request)}):
        yield app


@pytest.fixture
def amqtask_eager(amqtask_app: AmqTask) -> AmqTask:
    """`amqtask_app` with calls that run where they are made, without a worker."""
    amqtask_app.conf.task_always_eager = True
    return amqtask_app


@pytest.fixture
def amqtask_worker(amqtask_app: AmqTask, amqtask_worker_options: OptionDict) -> Iterator[Worker]:
    """A worker of `amqtask_app` in a thread of this process."""
    from amqtask.testing.worker import start_worker

    with start_worker(amqtask_app, **amqtask_worker_options) as worker:
        yield worker


@pytest.fixture
def amqtask_real_worker(
    request: pytest.FixtureRequest, amqtask_config: SettingDict, amqtask_worker_options: OptionDict
) -> Iterator[RealWorker]:
    """A worker process of the application that the option `amqtask_app` names, on that application's own broker."""
    name = request.config.getini("amqtask_app")
    if not name:
        raise pytest.UsageError(
            "amqtask_real_worker starts a process, which must know your application by its name: put "
            "amqtask_app = proj.celery:app into pytest's configuration"
        )
    from amqtask.testing.apps import load
    from amqtask.testing.process import real_worker

    app = load(name)
    settings = {**amqtask_config, **_marked(request)}
    with real_worker(app, name, settings=settings, folder=request.config.rootpath, **amqtask_worker_options) as worker:
        yield worker


def _marked(request: pytest.FixtureRequest) -> dict[str, object]:
    marks = [mark.kwargs for mark in request.node.iter_markers("amqtask")]
    return {name: value for settings in reversed(marks) for name, value in settings.items()}
