"""The console script: let the chosen pool prepare the process (monkey-patching), then import everything else."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from amqtask.cli.streams import make_usable

# Pools of ours whose `prepare_process` does nothing: looking them up would only cost every boot its 20 ms.
_NEEDS_NO_PREPARATION = frozenset({"prefork", "processes", "threads", "solo", "asyncio"})


def chosen_pool(argv: Sequence[str]) -> str | None:
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    make_usable()
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = chosen_pool(arguments)
    if name is not None and name not in _NEEDS_NO_PREPARATION:
        pools = importlib.import_module("amqtask.pool")
        exceptions = importlib.import_module("amqtask.exceptions")
        try:
            pools.find_pool(name).prepare_process()
        except exceptions.PoolNotFound as error:
            print(f"amqtask: {error}", file=sys.stderr)  # noqa: T201 - click is not imported yet, on purpose
            return 2
    cli = importlib.import_module("amqtask.cli.main")
    return int(cli.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
