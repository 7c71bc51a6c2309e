"""BrokerConnection: stands where Celery's API takes a connection, and opens none."""

from __future__ import annotations

from types import TracebackType


class BrokerConnection:
    """What `app.connection()` returns: the name of a broker, for `app.events.Receiver(connection)` and the like.

    Whatever it is given to connects by itself, and reconnects; there is nothing here to open, to share or to close.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def as_uri(self, include_password: bool = False, mask: str = "**") -> str:
        """The broker's URLs, without passwords."""
        return self._name

    def close(self) -> None:
        """Nothing is open."""

    release = close

    def __enter__(self) -> BrokerConnection:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<BrokerConnection {self._name}>"
