"""`celery.utils.threads`."""

from __future__ import annotations

import threading
from typing import Any

__all__ = ["Local", "LocalStack", "get_ident"]

Local = threading.local
get_ident = threading.get_ident


class LocalStack:
    """A stack for each thread."""

    def __init__(self) -> None:
        self._local = threading.local()

    @property
    def stack(self) -> list[Any]:
        """This thread's."""
        stack: list[object] = self._local.__dict__.setdefault("stack", [])
        return stack

    def push(self, obj: object) -> list[Any]:
        """One more."""
        self.stack.append(obj)
        return self.stack

    def pop(self) -> Any:
        """The last one; None when it is empty."""
        return self.stack.pop() if self.stack else None

    @property
    def top(self) -> Any:
        """The last one, which stays."""
        return self.stack[-1] if self.stack else None

    def __len__(self) -> int:
        return len(self.stack)
