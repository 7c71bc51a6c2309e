"""Applications for tests: the user's own on the in-memory broker, or a new one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from amqtask.app import AmqTask
from amqtask.ground.current import replaced
from amqtask.ground.plugins import plugins

if TYPE_CHECKING:
    from amqtask.ground.shapes import SettingValues

MEMORY = {"broker_url": "memory://", "result_backend": "cache+memory://", "flow_store": "memory://"}
# They would win over the settings.
VARIABLES = ("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL", "CELERY_RESULT_BACKEND")


def load(name: str) -> AmqTask:
    """The application under this name (`proj.celery:app`, as after -A). Raises: AppNotFound."""
    app: AmqTask = plugins().load_app(name, "amqtask_app in pytest's configuration")
    return app


@contextmanager
def in_memory(app: AmqTask, settings: SettingValues) -> Iterator[AmqTask]:
    """The application on a broker of its own in this process, with these settings; it is the current one in the block.

    At the end its settings are what they were, and the broker is gone with its messages and results.
    """
    with pytest.MonkeyPatch.context() as patch:
        for variable in VARIABLES:
            patch.delenv(variable, raising=False)
        with app.conf.overridden({**MEMORY, **settings}), replaced(app):
            app.clear_memory()
            try:
                yield app
            finally:
                app.clear_memory()


def new(**parameters: Any) -> AmqTask:
    """An application with no tasks but the shared ones."""
    return AmqTask(parameters.pop("main", "tests"), set_as_current=False, **parameters)
