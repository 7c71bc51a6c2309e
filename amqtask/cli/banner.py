"""What a worker says when it starts: broker, pool, queues, tasks."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence

from amqtask.ground import VERSION

_TITLE = "amqtask {version} on {system}"


def banner(
    *,
    node: str,
    app: str,
    broker: str,
    results: str,
    pool: str,
    concurrency: str,
    task_events: bool,
    queues: Sequence[tuple[str, str, str]],
    tasks: Iterable[str],
    show_tasks: bool,
) -> str:
    """The text; URLs come without passwords, `queues` as (name, exchange, routing key)."""
    title = _TITLE.format(version=VERSION, system=platform.system())
    rows = [
        ("app", app),
        ("broker", broker),
        ("results", results),
        ("concurrency", f"{concurrency} ({pool})"),
        ("task events", "ON" if task_events else "OFF (-E lets monitors see this worker's tasks)"),
    ]
    lines = ["", f" {node} · {title}", "", "[config]"]
    lines += [f"  {name:<12} {value}" for name, value in rows]
    lines += ["", "[queues]"]
    width = max((len(name) for name, _, _ in queues), default=0)
    for name, exchange, key in queues:
        where = f"exchange={exchange or '(default)'} key={key}"
        lines.append(f"  {name:<{width}}  {where}")
    if show_tasks:
        lines += ["", "[tasks]"]
        lines += [f"  {name}" for name in sorted(tasks)] or ["  (none: is the module with your tasks imported?)"]
    return "\n".join([*lines, ""])
