"""A listening socket on an I/O loop."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from amqtask.ground.loop import OneTimer

if TYPE_CHECKING:
    from amqtask.ground.loop import Loop

# Seconds without a look when a connection cannot be taken: it stays, and the loop would come back to it in every turn.
REST_SECONDS = 1.0


class Acceptor:
    """Gives the connections of a listening socket to `on_accepted`, from `start` to `stop`, which closes it.

    When the process has no file descriptor left, `make_room` may close a connection, and says whether it did."""

    def __init__(
        self,
        loop: Loop,
        listener: socket.socket,
        on_accepted: Callable[[socket.socket], None],
        *,
        make_room: Callable[[], bool] = lambda: False,
    ) -> None:
        listener.setblocking(False)
        self._loop = loop
        self._listener = listener
        self._on_accepted = on_accepted
        self._make_room = make_room
        self._rest = OneTimer(loop)

    def start(self) -> None:
        """Take connections."""
        self._loop.add_reader(self._listener.fileno(), self._accept)

    def stop(self) -> None:
        """Take no more, and close the socket."""
        self._rest.cancel()
        self._loop.remove_reader(self._listener.fileno())
        self._listener.close()

    def _accept(self) -> None:
        try:
            accepted, _ = self._listener.accept()
        except OSError as error:  # the client has gone again, or there are no more descriptors
            if error.errno in (errno.EMFILE, errno.ENFILE) and not self._make_room():
                self._loop.remove_reader(self._listener.fileno())
                self._rest.set(REST_SECONDS, self.start)
            return
        accepted.setblocking(False)
        self._on_accepted(accepted)
