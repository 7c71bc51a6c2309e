"""Fixtures under the names of celery.contrib.pytest, for tests that were written for it.

`pytest_plugins = ("amqtask.contrib.pytest",)` in conftest.py. Broker and result store are in the test's process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from amqtask.app import AmqTask
from amqtask.ground.plugins import load
from amqtask.testing.apps import in_memory, new
from amqtask.testing.worker import options_of_celery, start_worker
from amqtask.worker.worker import Worker

if TYPE_CHECKING:
    from amqtask.ground.shapes import KeywordDict, SettingDict, SettingValues


class ReloadableWorker:
    """The worker, and the method that tests for Celery call after they have made a task."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def reload(self) -> None:
        """Do nothing: a worker knows new tasks of its application at once."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._worker, name)


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker `celery`."""
    config.addinivalue_line("markers", "celery(**settings): settings of the application of celery_app in this test.")


@pytest.fixture(scope="session")
def celery_config() -> SettingDict:
    """Settings of the application; to be overridden."""
    return {}


@pytest.fixture(scope="session")
def celery_parameters() -> SettingDict:
    """Arguments of AmqTask(…); to be overridden."""
    return {}


@pytest.fixture(scope="session")
def celery_worker_parameters() -> dict[str, Any]:
    """Parameters of the worker; to be overridden."""
    return {}


@pytest.fixture(scope="session")
def celery_worker_pool() -> str:
    """solo, threads or asyncio; to be overridden."""
    return "solo"


@pytest.fixture(scope="session")
def celery_includes() -> Sequence[str]:
    """Modules that the session's worker imports; to be overridden."""
    return ()


@pytest.fixture(scope="session")
def celery_class_tasks() -> list[Any]:
    """Class-based tasks to register; to be overridden."""
    return []


@pytest.fixture(scope="session")
def celery_enable_logging() -> bool:
    """Accepted; logging is pytest's (`--log-cli-level=INFO`)."""
    return False


@pytest.fixture(scope="session")
def use_celery_app_trap() -> bool:
    """Accepted; a shared task always finds the application of the running test."""
    return False


@pytest.fixture
def celery_app(
    request: pytest.FixtureRequest, celery_config: SettingDict, celery_parameters: SettingDict
) -> Iterator[AmqTask]:
    """A new application for this test."""
    with _application(request, celery_config, celery_parameters) as app:
        yield app


@pytest.fixture(scope="session")
def celery_session_app(
    request: pytest.FixtureRequest, celery_config: SettingDict, celery_parameters: SettingDict
) -> Iterator[AmqTask]:
    """One application for all tests."""
    with _application(request, celery_config, celery_parameters) as app:
        yield app


@pytest.fixture
def celery_worker(
    celery_app: AmqTask,
    celery_includes: Sequence[str],
    celery_worker_pool: str,
    celery_worker_parameters: KeywordDict,
) -> Iterator[ReloadableWorker]:
    """A worker of `celery_app`, in a thread."""
    for module in celery_includes:
        load(module)
    with _started(celery_app, celery_worker_pool, celery_worker_parameters) as worker:
        yield ReloadableWorker(worker)


@pytest.fixture(scope="session")
def celery_session_worker(
    celery_session_app: AmqTask,
    celery_includes: Sequence[str],
    celery_class_tasks: list[Any],
    celery_worker_pool: str,
    celery_worker_parameters: KeywordDict,
) -> Iterator[ReloadableWorker]:
    """A worker of `celery_session_app` for all tests, in a thread."""
    for module in celery_includes:
        load(module)
    for task in celery_class_tasks:
        celery_session_app.register_task(task)
    with _started(celery_session_app, celery_worker_pool, celery_worker_parameters) as worker:
        yield ReloadableWorker(worker)


@pytest.fixture
def depends_on_current_app(celery_app: AmqTask) -> None:
    """Have `celery_app` be the current application."""


@contextmanager
def _application(request: pytest.FixtureRequest, config: SettingValues, parameters: SettingValues) -> Iterator[AmqTask]:
    mark = request.node.get_closest_marker("celery")
    with in_memory(new(**parameters), {**config, **(mark.kwargs if mark else {})}) as app:
        yield app


def _started(app: AmqTask, pool: str, parameters: SettingValues) -> AbstractContextManager[Worker]:
    # With another broker than memory:// celery_config names it.
    return start_worker(app, any_broker=True, **options_of_celery({"pool": pool, **parameters}))
