"""`worker`, the sender of a worker's signals and the parent of bootsteps."""

from __future__ import annotations

import os
from typing import Any

from amqtask.compat.bootsteps import Timer
from amqtask.ground.lazy import lazy
from amqtask.worker.worker import Worker


class OfWorker(Worker):
    """Bound to a worker."""

    @property
    def hostname(self) -> str:
        """The node's name."""
        return self.setup.hostname

    @lazy
    def timer(self) -> Timer:
        """Calls functions later, on the worker's loop."""
        return Timer(self.loop)

    def start(self) -> int:
        """Run until `stop`; the exit code."""
        return self.run()

    @property
    def pid(self) -> int:
        """The id of this process."""
        return os.getpid()

    @property
    def blueprint(self) -> Any:
        """The steps of the worker, with `app.steps`."""
        return self.app.steps["worker"]
