"""What lower rows ask of upper ones, as one contract; see amqtask.ground.plugins."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol


class Plugins(Protocol):
    """What the core asks for. Types of upper rows are Any: this row does not know them."""

    # -- programs written for Celery

    def celery_name(self, module: str, name: str) -> Any:
        """A name that one of our modules has only for them. Raises: AttributeError."""

    def celery_attribute(self, owner: object, name: str) -> Any:
        """An attribute that one of our objects has only for them, bound to it. Raises: AttributeError."""

    def celery_connection(self, app: Any) -> Any:
        """What `app.connection()` gives."""

    def celery_bootsteps(self, app: Any, worker: Any, options: object) -> Any:
        """A service that runs `app.steps` in a worker."""

    def celery_tracer(self, task: object) -> Any:
        """What a tracing library has put around a task's call, None where none has."""

    # -- the roof

    def default_app(self) -> Any:
        """An application with default settings, which is not made the current one."""

    def run_command_line(self, app: Any, argv: Sequence[str]) -> int:
        """`amqtask …` with this application (None: that which the arguments lead to); the exit code."""

    def load_app(self, name: str, source: str) -> Any:
        """The application under this name, as after -A; `source` says who gave it. Raises: AppNotFound."""

    # -- pools

    def pool(self, name: str) -> Any:
        """The class of one of our own pools, None for another name. Raises: ModuleNotFoundError (its library, or all of ours)."""

    # -- Django; each raises ImportError where it is not installed

    def load_django(self) -> None:
        """Have its applications ready."""

    def django_time_zone(self) -> str:
        """The settings' TIME_ZONE."""

    def django_backend(self, scheme: str) -> Any:
        """The class of result store for `django-db://` and `django-cache://`, None for another scheme."""

    def django_outbox(self, database: str) -> Any:
        """The outbox in a database of Django's."""

    def after_commit(self, call: Callable[[], object], outbox: Any) -> None:
        """Call when the present transaction of Django's is committed."""

    def aafter_commit(self, call: Callable[[], object], outbox: Any) -> Awaitable[None]:
        """The same without blocking the event loop."""

    def follow_django_settings(self, conf: Any, namespace: str | None) -> None:
        """Have changes of Django's settings take effect in `conf`."""

    def around_django_tasks(self) -> Any:
        """What tasks run in, in a Django project."""
