"""The console script: let the chosen pool prepare the process (monkey-patching), then import everything else."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from amqtask.ground.startup import make_usable, no_collection, pool_on_command_line

# Pools of ours whose `prepare_process` does nothing: looking them up would only cost every boot its 20 ms.
_NEEDS_NO_PREPARATION = frozenset({"prefork", "processes", "threads", "solo", "asyncio"})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    make_usable()
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = pool_on_command_line(arguments)
    if name is not None and name not in _NEEDS_NO_PREPARATION:
        from amqtask.exceptions import ConfigurationError
        from amqtask.pool import find_pool

        try:
            find_pool(name).prepare_process()
        except ConfigurationError as error:
            print(f"amqtask: {error}", file=sys.stderr)  # noqa: T201 - click is not imported yet, on purpose
            return 2
    with no_collection():
        from amqtask.cli.main import run

    exit_code = run(arguments)
    if argv is None:
        from amqtask.cli.daemon import end_in_time

        end_in_time(exit_code)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
