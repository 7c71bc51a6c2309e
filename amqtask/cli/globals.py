"""The options before the sub-command, for all sub-commands."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from amqtask.cli.handover import await_load
from amqtask.ground.startup import no_collection

if TYPE_CHECKING:
    from amqtask.app import AmqTask

    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType  # generic only in newer versions of click

PROGRAM = "amqtask"
COMPLETE_VARIABLE = "_AMQTASK_COMPLETE"


@dataclass
class Globals:
    """The options before the sub-command, and the app they lead to."""

    app: str | None = None
    broker: str | None = None
    result_backend: str | None = None
    config: str | None = None
    color: bool = True
    quiet: bool = False
    # Where the command was started, before --workdir.
    started_in: Path = field(default_factory=Path.cwd)
    loaded: Any = field(default=None, repr=False)
    _is_told: bool = False

    def load(self, app_path: str | None = None) -> AmqTask:
        """The application, with the command line's broker, backend and configuration put into its settings."""
        if not self._is_told:
            await_load()
            with no_collection():
                from amqtask.cli.find_app import find_app

            app: AmqTask = self.loaded or find_app(app_path or self.app)
            if self.config:
                app.conf.read_object(self.config)  # what it says counts more than the application
            if self.broker:
                app.conf.broker_url = self.broker
                os.environ.pop("CELERY_BROKER_URL", None)  # it would win over the settings
            if self.result_backend:
                app.conf.result_backend = self.result_backend
                os.environ.pop("CELERY_RESULT_BACKEND", None)
            app.set_current()  # whatever else its modules made: shared tasks and `current_app` are this one's
            self.loaded, self._is_told = app, True
        loaded: AmqTask = self.loaded
        return loaded
