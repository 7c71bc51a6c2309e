"""The pool contract, its types, and `find_pool(name)`.

A pool runs requests in slots (child processes, threads, greenlets, coroutines, or the caller's own thread) and hands each
outcome back on the worker's I/O loop. It never knows the broker. Third parties register theirs under the
entry-point group `amqtask.pools`; `amqtask.testing.suites.pool` is the conformance suite they run.

Nothing here may create a lock, thread or socket at import: this module is imported before monkey-patching.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, cast

from amqtask.exceptions import PoolNotFound
from amqtask.ground.loop import Loop as Loop
from amqtask.ground.loop import Timer as Timer
from amqtask.ground.plugins import completed, did_you_mean, load_path, plugins

if TYPE_CHECKING:
    from amqtask.execution.executor import Executor
    from amqtask.execution.request import Outcome, Request
    from amqtask.ground.shapes import JsonObject


class Running(NamedTuple):
    """A request that runs: in which process, and since when on `time.monotonic` (None: the pool does not note it)."""

    pid: int
    since: float | None = None


# They patch Python first of all in a process, and their threads are green ones.
GREEN_POOLS = frozenset({"eventlet", "gevent"})


@dataclass(frozen=True, slots=True)
class PoolOptions:
    """What the command line and settings ask of a pool. Times are seconds, memory is KiB (as in Celery)."""

    slots: int
    max_tasks_per_child: int | None = None
    max_memory_per_child: int | None = None
    # How long a child may take to start before it counts as dead.
    start_timeout: float = 10.0
    hostname: str = ""
    # Called in each new child process, before its first task (closes what must not be shared, signals, logging).
    on_child_start: Callable[[], None] | None = None


# Called on the loop. With an empty sequence it says only that `free` may have changed.
OnOutcomes = Callable[[Sequence["Outcome"]], None]


class PoolDefaults(Protocol):
    """What a pool may leave out; `find_pool` adds it to one that derives from nothing of ours."""

    # The limits for `def` tasks, where they are others than those for `async def` tasks; None: `limits` is for both.
    def_limits: ClassVar[frozenset[str] | None] = None
    # Why no other pool can be in its process; None: others can.
    alone: ClassVar[str | None] = None
    # Of several pools in one: which, and for which queues; the first is for all others.
    shares: ClassVar[tuple[Share, ...]] = ()

    @classmethod
    def prepare_process(cls) -> None:
        """Called first of all in the process, before anything else is imported (monkey-patching)."""
        return None  # noqa: RET501 - an empty body would be an abstract method

    def restart(self) -> None:
        """Replace all processes, each when its task has ended; called only where `can_restart`."""
        raise RuntimeError("this pool has no processes to replace")

    def cancel(self, number: int, reason: str) -> None:
        """Ask one running request to end, where its code can be told: raise CancelledError in a coroutine. It may go on."""
        return None  # noqa: RET501 - as above

    @property
    def can_restart(self) -> bool:
        """Whether the pool has processes that `restart` replaces."""
        return type(self).restart is not PoolDefaults.restart

    @property
    def members(self) -> tuple[Pool, ...]:
        """The pools that this one consists of: itself, or several, of which the first runs what comes from any other queue."""
        return (cast("Pool", self),)

    def member(self, queue: str) -> Pool:
        """The one of them that runs what comes from this queue; only while that one is `free`, `submit` takes it."""
        return cast("Pool", self)


class Pool(PoolDefaults, Protocol):
    """Runs requests. Constructed with everything it needs; `start` before the first `submit`.

    What it may leave out: PoolDefaults.
    """

    name: ClassVar[str]
    # Of {"soft", "hard"}: the time limits this pool can enforce; a task that asks for another is refused at start-up
    # (ask `limits_of`, which knows the pools that have others for `def` tasks).
    limits: ClassVar[frozenset[str]]

    def __init__(self, executor: Executor, loop: Loop, on_outcomes: OnOutcomes, options: PoolOptions) -> None: ...

    def start(self) -> None: ...

    @property
    def slots(self) -> int:
        """How many requests may run at once."""

    @property
    def free(self) -> int:
        """How many requests `submit` takes now. A pool may take a few more than idle slots if it can give them back
        to another slot when they would wait."""

    def submit(self, request: Request) -> None:
        """Run it; only while `free` > 0. Its outcome (exactly one) comes through `on_outcomes` on the loop."""

    def resize(self, slots: int) -> None:
        """Grow or shrink; slots that are busy end when their task does."""

    def take_back(self) -> list[Request]:
        """Requests that were submitted and have not begun: from now on they are the caller's, and no outcome follows. A pool
        that begins each at once has none."""

    def terminate(self, number: int, reason: str, signum: int | None = None) -> bool:
        """End one running request from outside (outcome REVOKED); False if this pool cannot, or it does not run.

        A pool of processes sends `signum` (None: TERM), and KILL if that does not end it soon."""

    def find(self, number: int) -> Running | None:
        """Where and since when this request runs; None if it has not begun, or does not run here."""

    def stop(self) -> list[Request]:
        """End everything now and return the requests that had not finished; no outcome follows for those.

        The worker drains first (it keeps the loop running until nothing runs), so this is quick. May be called twice,
        and before `start`."""

    def stats(self) -> JsonObject: ...


class Share(NamedTuple):
    """One of several pools: its class, its slots (None: the worker's concurrency), and the queues that it is for."""

    pool: type[Pool]
    slots: int | None = None
    queues: tuple[str, ...] = ()


def share_of(pool_class: type[Pool], queue: str | None) -> Share:
    """The one of a worker's pools that runs what comes from this queue."""
    shares = pool_class.shares or (Share(pool_class),)
    return next((share for share in shares if queue in share.queues), shares[0])


def limits_of(pool_class: type[Pool], *, is_async: bool) -> frozenset[str]:
    """The limits that a pool enforces for `async def` tasks, or for `def` tasks."""
    def_limits = pool_class.def_limits
    return pool_class.limits if is_async or def_limits is None else def_limits


GROUP = "amqtask.pools"
# Ours, which are found without importlib.metadata, for which a worker would pay 20 ms; the entry points say the same.
OURS = ("solo", "prefork", "processes", "threads", "eventlet", "gevent", "asyncio")


def find_pool(name: str) -> type[Pool]:
    """The pool class of that name, by entry point; or of several (`prefork:4=reports,asyncio:200=web`).

    Raises: PoolNotFound (unknown, or its library is not installed), ConfigurationError (several that cannot be in one worker).
    """
    try:
        pool_class: type[Pool] = plugins().pool(name) or _other_pool(name)
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if error.name == "amqtask_pools":
            raise PoolNotFound("no pool is there. Is amqtask installed (pip install -e . in a checkout)?") from error
        if library in ("", "amqtask", "amqtask_pools"):
            raise
        requirement = f"amqtask[{name}]" if name in OURS else library
        raise PoolNotFound(
            f'pool {name!r} needs {library}, which is not installed: pip install "{requirement}"'
        ) from error
    complete: type[Pool] = completed(pool_class, PoolDefaults)
    return complete


def _other_pool(name: str) -> Any:
    # Not imported above: it brings threading and socket too, which green pools patch first.
    from importlib.metadata import entry_points

    paths = {point.name: point.value for point in entry_points(group=GROUP)}
    if name not in paths:
        names = sorted({*OURS, *paths})
        raise PoolNotFound(f"no pool {name!r}.{did_you_mean(name, names, most=2)} There are: {', '.join(names)}.")
    return load_path(paths[name])
