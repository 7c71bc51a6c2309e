"""BrokerConnection: an argument where Celery's API takes a connection; it opens none."""

from __future__ import annotations

from types import TracebackType


class BrokerConnection:
    """The return value of `app.connection()`: names a broker, for `app.events.Receiver(connection)` and the like.

    The receiver connects by itself, and reconnects; this object has nothing to open, to share or to close.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def as_uri(self, include_password: bool = False, mask: str = "**") -> str:
        """The broker's URLs, without passwords."""
        return self._name

    def close(self) -> None:
        """Does nothing: no connection is open."""

    release = close

    def __enter__(self) -> BrokerConnection:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<BrokerConnection {self._name}>"
