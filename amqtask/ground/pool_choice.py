"""Which pool a command line names, found before anything else is imported: a green pool patches Python first."""

from __future__ import annotations

import os
from collections.abc import Sequence


def pool_on_command_line(argv: Sequence[str]) -> str | None:
    """The pool named by -P, --pool or AMQTASK_POOL, or for a shell by --eventlet or --gevent; None when nothing names one
    or neither a worker nor a shell is started."""
    if "shell" in argv:
        return next((argument[2:] for argument in argv if argument in ("--eventlet", "--gevent")), None)
    if "worker" not in argv:
        return None
    for position, argument in enumerate(argv):
        if argument == "--":
            break
        if argument in ("-P", "--pool"):
            return argv[position + 1] if position + 1 < len(argv) else None
        if argument.startswith("--pool="):
            return argument[len("--pool=") :]
        if argument.startswith("-P") and not argument.startswith("--"):
            return argument[2:]
    return os.environ.get("AMQTASK_POOL")
