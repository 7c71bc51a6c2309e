"""`amqtask console` as a process: what strangers leave half done prints no traceback, and it ends when it is told to."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.waiting import eventually

APP = """
from amqtask import AmqTask
app = AmqTask("shop", broker="amqp://127.0.0.1:1//", task_history=True, history_url="sqlite:///history.sqlite3")
"""
LOOK = b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n"
FORM = b"POST /do/revoke HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nid="
PATIENCE = 60.0


class Served:
    """The console's process."""

    def __init__(self, folder: Path) -> None:
        (folder / "shop.py").write_text(APP)
        line = ["-m", "amqtask", "-A", "shop", "console", "-p", "0", "--no-index", "--no-alerts", "-l", "WARNING"]
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-u", *line], cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self.process.stdout is not None
        words = self.process.stdout.readline().split("http://127.0.0.1:")
        assert len(words) == 2, self.said
        self.port = int(words[1].partition(",")[0])

    @property
    def said(self) -> str:
        return self._log.read_text()

    def send(self, request: bytes) -> socket.socket:
        """A connection on which the request was sent."""
        connections: list[socket.socket] = []

        def is_open() -> bool:
            assert self.process.poll() is None, self.said
            with contextlib.suppress(ConnectionRefusedError):
                connections.append(socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE))
            return bool(connections)

        eventually(is_open)
        connections[0].sendall(request)
        return connections[0]

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(PATIENCE)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    made = Served(tmp_path)
    yield made
    made.process.kill()
    made.process.communicate()


def test_it_ends_while_a_page_is_open(served: Served) -> None:
    with served.send(LOOK) as page:
        assert b"200 OK" in page.recv(1000)

        served.end()

    assert served.said == ""


def test_a_form_that_breaks_off_is_not_told_as_an_error(served: Served) -> None:
    served.send(FORM).close()
    with served.send(LOOK) as page:
        assert b"200 OK" in page.recv(1000)

    served.end()

    assert served.said == ""
