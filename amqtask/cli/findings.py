"""What `amqtask doctor` reads (Facts), and what it finds (Finding)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.ground.shapes import JsonObject
    from amqtask.protocol.entities import Declaration, Queue
    from amqtask.remote.pauses import Pause
    from amqtask.transport.contract import QueueState

Severity = Literal["error", "warning", "info"]
ORDER: tuple[Severity, ...] = ("error", "warning", "info")
FEWEST_FILES = 512


class Finding(NamedTuple):
    """One thing that is wrong, or will be."""

    severity: Severity
    subject: str
    what: str
    why: str
    do: str


@dataclass(slots=True)
class Facts:
    """What was read. `server` is what the broker says of itself; what nobody could say is empty or None."""

    app: AmqTask
    product: str = ""
    version: tuple[int, ...] = ()
    server: Mapping[str, str] = field(default_factory=dict)
    queues: Sequence[Queue] = ()
    # Exchanges and queues that delays need.
    delays: Sequence[Declaration] = ()
    states: Mapping[str, QueueState] = field(default_factory=dict)
    paused: Mapping[str, Pause] = field(default_factory=dict)
    differences: Sequence[str] = ()
    policies: Sequence[JsonObject] = ()
    nodes: Sequence[JsonObject] = ()
    live_queues: Sequence[JsonObject] = ()
    flags: Sequence[JsonObject] = ()
    permissions: JsonObject | None = None
    # How many queues the virtual host may have.
    most_queues: int | None = None
    # Seconds by which the broker's clock is ahead.
    clock_ahead: float | None = None
    # Exchanges that are not there, and what needs them: queues for dead letters, tasks.
    missing_exchanges: Mapping[str, Sequence[str]] = field(default_factory=dict)
    # What the Redis behind a setting says of itself; `broker` is in `server`.
    stores: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    # Seconds by which workers' clocks are ahead of ours.
    worker_clocks: Mapping[str, float] = field(default_factory=dict)
    files: int = FEWEST_FILES
    is_root: bool = False


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """Errors first."""
    return sorted(findings, key=lambda finding: ORDER.index(finding.severity))
