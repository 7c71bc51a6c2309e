"""The garbage collector while a program begins."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """For a block that imports much: without the collector, which would look at all of it again and again, and find nothing.

    What is there afterwards stays for as long as the process, so the collector never looks at it again (`gc.freeze`).
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
