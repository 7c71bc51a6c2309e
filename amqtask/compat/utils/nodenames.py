"""`celery.utils.nodenames`."""

from __future__ import annotations

import os
import socket

from amqtask.cli.daemon import expand, node_name
from amqtask.protocol.entities import Queue

__all__ = [
    "anon_nodename", "default_nodename", "gethostname", "host_format", "node_format", "nodename", "nodesplit", "worker_direct",
]  # fmt: skip

gethostname = socket.gethostname


def nodename(name: str, hostname: str) -> str:
    """`name@host`."""
    return f"{name}@{hostname}"


def nodesplit(name: str) -> tuple[str | None, str]:
    """The parts of `name@host`; without an @ it is the host."""
    node, at, host = name.partition("@")
    return (node, host) if at else (None, node)


def default_nodename(hostname: str | None) -> str:
    """`celery@host`."""
    name, host = nodesplit(hostname or "")
    return nodename(name or "celery", host or gethostname())


def anon_nodename(hostname: str | None = None, prefix: str = "gen") -> str:
    """The name of a client: `gen<pid>@host`."""
    return nodename(f"{prefix}{os.getpid()}", hostname or gethostname())


def node_format(s: str, name: str, **extra: str) -> str:
    """Fill the %-fields of a text for a node."""
    return expand(s, name)


def host_format(s: str, host: str | None = None, name: str | None = None, **extra: str) -> str:
    """The same for a host."""
    return expand(s, nodename(name or "celery", host or gethostname()))


def worker_direct(hostname: str | Queue) -> Queue:
    """The queue of one worker."""
    return hostname if isinstance(hostname, Queue) else Queue(f"{node_name(hostname)}.dq")
