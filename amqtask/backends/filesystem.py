"""`file:///path`: a file per result in a folder that all processes share, as Celery names and fills them
(celery/backends/filesystem.py).

A file is complete as soon as it has its name: it is written under another one and then renamed, or linked if it must be the
first. Who replaces a file holds the folder's lock from the look at the old one to the rename.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote

from amqtask.backends.contract import BackendOptions
from amqtask.backends.polling import IsFinal, ValueBackend
from amqtask.exceptions import BackendUnreachable, ConfigurationError, EncodeError

_LOCK, _NEW = ".amqtask-lock", ".amqtask-new-"
# Of most file systems.
_LONGEST_NAME = 255
# Errors that may pass by themselves: a mount comes back, somebody clears the disk.
_TRANSIENT = frozenset(
    {errno.ENOENT, errno.ENOSPC, errno.EIO, errno.ESTALE, errno.ENOLCK, errno.EAGAIN, errno.ETIMEDOUT}
)


class FileBackend(ValueBackend):
    """See amqtask.backends.contract.ResultBackend and `ValueBackend` for `transport_options`."""

    def __init__(self, options: BackendOptions) -> None:
        super().__init__(options)
        self._expires = options.expires
        self._folder = folder_of(options.url)
        if not self._folder.is_dir() or not os.access(self._folder, os.R_OK | os.W_OK | os.X_OK):
            raise ConfigurationError(
                f"result_backend {options.url}: {self._folder} is not a folder that this process may write to; make it first"
            )

    def get_values(self, keys: Sequence[str]) -> Mapping[str, bytes]:
        """The contents of files; one that is empty is being written (by Celery, which does not rename)."""
        values = {}
        for key in keys:
            with contextlib.suppress(FileNotFoundError):
                value = self._path(key).read_bytes()
                if value:
                    values[key] = value
        return values

    def put_value(self, key: str, value: bytes) -> None:
        """Rename a new file."""
        path = self._path(key)
        with self._written(value) as new:
            new.replace(path)

    def put_unless(self, key: str, value: bytes, is_final: IsFinal) -> None:
        """Link a new file, or replace the old one under the lock."""
        path = self._path(key)
        with self._written(value) as new:
            try:
                os.link(new, path)
                return
            except FileExistsError:
                pass
            with (self._folder / _LOCK).open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the file is closed
                stored = self.get_values([key]).get(key)
                if stored is None or not is_final(stored):
                    new.replace(path)

    def delete_value(self, key: str) -> None:
        """Delete the file."""
        self._path(key).unlink(missing_ok=True)

    def cleanup(self) -> None:
        """Delete the files of tasks and groups that were last written before `result_expires`, and what crashes left."""
        if not self._expires:
            return
        oldest = time.time() - self._expires
        for path in self._folder.iterdir():
            if path.name.startswith((self._task_prefix, self._group_prefix, _NEW)):
                with contextlib.suppress(FileNotFoundError):  # somebody else cleans up too
                    if path.stat().st_mtime < oldest:
                        path.unlink()

    def is_transient(self, error: Exception) -> bool:
        """A folder that is gone may be mounted again; one that we may not write to stays so."""
        return isinstance(error, OSError) and error.errno in _TRANSIENT

    def explain(self, error: Exception) -> Exception:
        """Our error for one of the file system, with the folder's name."""
        return BackendUnreachable(f"results cannot be kept in {self._folder}: {error}")

    def _path(self, key: str) -> Path:
        if "/" in key or "\x00" in key:
            raise EncodeError(f"{key!r} cannot be the name of a file: a task id for file:// has no / in it")
        if len(os.fsencode(key)) > _LONGEST_NAME:
            raise EncodeError(f"{key!r} cannot be the name of a file: it has more than {_LONGEST_NAME} bytes")
        return self._folder / key

    @contextlib.contextmanager
    def _written(self, value: bytes) -> Iterator[Path]:
        new = self._folder / f"{_NEW}{uuid.uuid4().hex}"
        try:
            new.write_bytes(value)
            yield new
        finally:
            new.unlink(missing_ok=True)


def folder_of(url: str) -> Path:
    """The folder of `file:///path` or `file://localhost/path`. Raises: ConfigurationError."""
    host, _, path = url.partition("://")[2].partition("/")
    if host not in ("", "localhost") or not path:
        raise ConfigurationError(f"{url} names no folder: write file:///an/absolute/path")
    return Path("/" + unquote(path))
