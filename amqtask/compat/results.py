"""`celery.result.ResultBase`, and states that can be compared."""

from __future__ import annotations

from abc import ABC

from amqtask.result import AsyncResult
from amqtask.results import ResultSet

PRECEDENCE = ("SUCCESS", "FAILURE", None, "REVOKED", "STARTED", "RECEIVED", "REJECTED", "RETRY", "PENDING")


class ResultBase(ABC):  # noqa: B024 - only for isinstance
    """Any kind of result, for `isinstance`."""


ResultBase.register(AsyncResult)
ResultBase.register(ResultSet)


def precedence(name: str) -> int:
    """The place of a state: what is smaller says more."""
    return PRECEDENCE.index(name) if name in PRECEDENCE else PRECEDENCE.index(None)


class state(str):
    """`state("SUCCESS") > state("PENDING")`."""

    __slots__ = ()

    def __gt__(self, other: str) -> bool:
        return precedence(self) < precedence(other)

    def __ge__(self, other: str) -> bool:
        return precedence(self) <= precedence(other)

    def __lt__(self, other: str) -> bool:
        return precedence(self) > precedence(other)

    def __le__(self, other: str) -> bool:
        return precedence(self) >= precedence(other)
