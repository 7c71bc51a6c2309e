"""What integration tests install when they first need it, installed ahead: Debian packages and virtual environments.

    python -m integration.prepare

On a fresh machine that takes minutes, in which the unit tests run. What cannot be installed is said; the tests that need it fail
or are skipped, and say why.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable

from integration import celery_peer, flower_peer, node_peer
from integration.machine import NodeError, apt_install
from integration.servers import mongo_program, postgres_programs

# (program, its Debian package, the variable that names a server to be used in its place). PostgreSQL's are not in PATH.
PROGRAMS = (
    ("memcached", "memcached", "AMQTASK_MEMCACHED"),
    ("promtool", "prometheus", ""),
    ("chromium", "chromium", ""),
    ("chromedriver", "chromium-driver", ""),
)
INSTALLATIONS: tuple[tuple[Callable[[], object], str], ...] = (
    (postgres_programs, "AMQTASK_POSTGRES_URL"),
    (celery_peer.python, ""),
    (flower_peer.python, ""),
    (node_peer.modules, ""),
    (mongo_program, "AMQTASK_MONGODB_URL"),
)


def main() -> int:
    """Always 0: who needs what is not there says so."""
    missing = [
        package for name, package, variable in PROGRAMS if shutil.which(name) is None and variable not in os.environ
    ]
    if missing:
        apt_install(*missing)
    for install, variable in INSTALLATIONS:
        if variable in os.environ:
            continue
        try:
            install()
        except (NodeError, OSError, subprocess.CalledProcessError) as error:
            print(f"not installed ahead: {error}", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
