"""Exceptions that strike from outside (a signal handler, another thread), told from those that a function raises by itself."""

from __future__ import annotations

from collections.abc import Callable


def is_own(error: Exception, function: Callable[[], object]) -> bool:
    """Whether an error that came out of a function is its own: then it comes again when the function is called again.

    For places that make another error of it. One that struck from outside must go on as it is, to whoever it is meant for.
    """
    try:
        function()
    except type(error):
        return True
    return False
