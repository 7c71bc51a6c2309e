"""The state file (--statedb): revoked ids and stamps from run to run, also when the worker is killed in between.

It is written shortly after a change, by a short-lived thread: as a new file that replaces the old one, so that a reader finds
a complete file. A file that cannot be read is renamed and kept, with a log line.
"""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from amqtask.exceptions import ConfigurationError
from amqtask.ground.printable import bounded_logger

if TYPE_CHECKING:
    from amqtask.ground.shapes import JsonObject
    from amqtask.worker.revoked import Revocations

logger = bounded_logger("amqtask.worker")


class StateFile:
    """One file and the revokes that it keeps. `save_soon` may be called often; it writes only after a change."""

    def __init__(self, path: str, revoked: Revocations) -> None:
        self._path = Path(path).absolute()
        self._revoked = revoked
        self._saved_version = revoked.version
        self._writer: threading.Thread | None = None
        self._is_loaded = False
        self._has_complained = False

    def load(self) -> None:
        """Take over the revokes of the last run. Raises: ConfigurationError when the file could never be written."""
        folder = self._path.parent
        if not os.access(folder, os.W_OK):
            raise ConfigurationError(f"the state file {self._path} cannot be written: is {folder} a folder of yours?")
        self._is_loaded = True
        try:
            state = json.loads(self._path.read_bytes())
            ids = {str(key): float(since) for key, since in state["revoked"].items()}
            stamps = {(str(name), value): float(since) for name, value, since in state.get("revoked_stamps", ())}
        except FileNotFoundError:
            return
        except OSError as error:
            raise ConfigurationError(f"the state file {self._path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._put_aside(error)
            return
        self._revoked.merge(ids, stamps, time.time())
        self._saved_version = self._revoked.version

    def _put_aside(self, error: Exception) -> None:
        new_path = self._path.with_name(f"{self._path.name}.unreadable-{time.time_ns()}")
        self._path.replace(new_path)
        logger.error(
            "worker: the state file %s is not one of ours (%r): what was revoked before is not known. It is kept as %s",
            self._path,
            error,
            new_path.name,
        )

    def save_soon(self) -> None:
        """Write the file if there was a change, without waiting."""
        if self._revoked.version == self._saved_version or (self._writer is not None and self._writer.is_alive()):
            return
        state = self._take_state()
        self._writer = threading.Thread(target=self._write, args=(state,), name="amqtask-state", daemon=True)
        self._writer.start()

    def save(self) -> None:
        """Write the file and wait until that is done; not if the worker did not even start."""
        if not self._is_loaded:
            return
        if self._writer is not None:
            self._writer.join()
        self._write(self._take_state())

    def _take_state(self) -> JsonObject:
        self._saved_version = self._revoked.version
        stamps = [[name, value, since] for (name, value), since in self._revoked.stamps.items()]
        return {"revoked": self._revoked.ids, "revoked_stamps": stamps}

    def _write(self, state: JsonObject) -> None:
        new = self._path.with_name(f"{self._path.name}.new-{os.getpid()}")
        try:
            with new.open("w") as file:
                json.dump(state, file)
                file.flush()
                os.fsync(file.fileno())
            new.replace(self._path)
            self._has_complained = False
        except OSError as error:
            if not self._has_complained:
                self._has_complained = True
                logger.error("worker: the state file %s cannot be written: %s", self._path, error)
