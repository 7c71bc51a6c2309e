"""What a web process writes down of its transactions, for whoever kills it."""

from __future__ import annotations

import os
from pathlib import Path


class Failed(Exception):
    """What goes wrong in some of the transactions."""


class Journal:
    """What a client knows of its transactions; a file, as the client is killed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def write(self, word: str, end: str, task_id: str) -> None:
        """One line, in one call: it is there whole, or not at all."""
        os.write(self._file, f"{word} {end} {task_id}\n".encode())

    def ids(self, word: str, *ends: str) -> set[str]:
        """The ids of lines with that word and one of these ends."""
        lines = (line.split() for line in self._path.read_text().splitlines())
        return {task_id for found, end, task_id in lines if found == word and end in ends}
