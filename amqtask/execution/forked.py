"""The end of a process that a task forked with os.fork and let run out of the task: it must not go on as a second slot."""

from __future__ import annotations

import os
import sys
import traceback
from typing import NoReturn


def end_forked(error: BaseException | None) -> NoReturn:
    """End this process as a program ends that returned, or that raised `error`."""
    code = 0
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    elif error is not None:
        traceback.print_exception(error)
        code = 1
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()
    os._exit(code & 0xFF)
