"""AmqTask bound to a Flask application, or to those that a factory makes: configuration, an application context for each task.

    tasks = AmqTask()          # or AmqTask(app)

    def create_app():
        app = Flask(__name__)
        app.config["AMQTASK"] = {"broker_url": "amqp://…", "result_backend": "rpc://"}
        tasks.init_app(app)
        return app

`flask --app shop amqtask worker` and `amqtask -A shop:create_app worker` start a worker.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flask import Flask

from amqtask.app import AmqTask as Application
from amqtask.exceptions import ConfigurationError

if TYPE_CHECKING:
    from amqtask.ground.shapes import SettingDict, SettingValues

# Under this name the application is in `app.extensions`.
EXTENSION = "amqtask"
NO_FLASK = (
    "this application has no Flask app in this process: call init_app(app), or start with `flask --app … amqtask …` "
    "or `amqtask -A module:create_app …`"
)


class AmqTask(Application):
    """An application whose tasks run in an application context of a Flask app, each in its own.

    Settings come from `app.config`, read when the first one is asked for: the mappings CELERY and AMQTASK, and keys that begin
    with CELERY_ or AMQTASK_; AMQTASK wins over CELERY, a key over a mapping, and all of them over `options` (amqtask.AmqTask's).
    """

    def __init__(self, flask: Flask | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.flask: Flask | None = None
        self._from_flask: set[str] = set()
        if flask is not None:
            self.init_app(flask)

    def init_app(self, flask: Flask) -> None:
        """Bind the application to a Flask app; its configuration replaces that of an earlier one."""
        self.flask = flask
        self.main = self.main or flask.name
        flask.extensions[EXTENSION] = self
        self.conf.later(lambda: self._configure(flask.config))

    def _configure(self, config: SettingValues) -> None:
        for name in self._from_flask:
            self.conf.pop(name, None)
        before = set(self.conf.table())
        for namespace in ("CELERY", "AMQTASK"):
            for name, value in (config.get(namespace) or {}).items():
                self.conf[name] = value
            self.conf.read_object(_of_namespace(config, namespace), namespace=namespace)
        self._from_flask = set(self.conf.table()) - before

    def finalize(self, auto: bool = False) -> None:
        """As `amqtask.AmqTask.finalize`. Raises: ConfigurationError without a Flask app."""
        if self.flask is None:
            raise ConfigurationError(NO_FLASK)
        super().finalize(auto)

    def register_task(self, task: Any, **options: object) -> Any:
        """As `amqtask.AmqTask.register_task`; the task runs in an application context."""
        instance = task(**options) if isinstance(task, type) else task
        instance.run = self._in_context(instance.run)
        return super().register_task(instance)

    def _in_context(self, run: Callable[..., object]) -> Callable[..., object]:
        if inspect.iscoroutinefunction(run):

            @functools.wraps(run)
            async def run_async(*args: object, **kwargs: object) -> object:
                with self._app_of_tasks.app_context():
                    return await run(*args, **kwargs)

            return run_async

        @functools.wraps(run)
        def run_here(*args: object, **kwargs: object) -> object:
            with self._app_of_tasks.app_context():
                return run(*args, **kwargs)

        return run_here

    @property
    def _app_of_tasks(self) -> Flask:
        if self.flask is None:
            raise ConfigurationError(NO_FLASK)
        return self.flask


def _of_namespace(config: SettingValues, namespace: str) -> SettingDict:
    """The entries whose names begin with the namespace, old names such as CELERYBEAT_SCHEDULE among them."""
    return {name: value for name, value in config.items() if name.startswith(namespace) and name != namespace}
