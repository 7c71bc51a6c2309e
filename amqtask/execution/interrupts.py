"""Exceptions that a pool raises inside a task to end it; the executor makes the outcome from the type.

All derive from Terminated, a BaseException, so that a task's `except Exception` lets them pass. (The soft time limit,
SoftTimeLimitExceeded, is an Exception on purpose: the task may handle it.)
"""

from __future__ import annotations

from amqtask.exceptions import Terminated


class HardLimitReached(Terminated):
    """The hard time limit: `seconds` have passed."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"hard time limit of {seconds:g} s exceeded")
        self.seconds = seconds


class Abandoned(Terminated):
    """The pool stops and has returned the request: nothing is stored, and the outcome is dropped."""

    def __init__(self) -> None:
        super().__init__("the worker stops")
