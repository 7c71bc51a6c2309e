"""Several pools in one worker: `-P prefork:4=reports+mail,asyncio:200=web`.

Each has slots of its own; a request runs in the pool that its queue is given to, and queues that are given to none belong to the
first pool (or to the one without `=`). The worker sees one pool, and asks `member(queue)` where it matters.

Processes are forked before threads are started. A process that is replaced later is forked beside running threads: what a
library in another pool has locked at that moment stays locked in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

from amqtask.exceptions import ConfigurationError
from amqtask.ground.printable import bounded_logger
from amqtask.pool import Pool, PoolDefaults, Running, Share, find_pool, limits_of
from amqtask.topology.declarations import base_of

if TYPE_CHECKING:
    from amqtask.execution.executor import Executor
    from amqtask.execution.request import Request
    from amqtask.ground.shapes import JsonObject
    from amqtask.pool import Loop, OnOutcomes, PoolOptions

logger = bounded_logger("amqtask.pools")

FORM = "NAME[:SLOTS][=QUEUE[+QUEUE…]], as in prefork:4=reports+mail,asyncio:200=web"


def several_pools(text: str) -> type[Pool]:
    """The class that has all these pools. Raises: ConfigurationError (PoolNotFound), which says what to write."""
    shares = [_read(item, text) for item in text.split(",")]
    _check(shares, text)
    # The one for all other queues is the first.
    shares.sort(key=lambda share: bool(share.queues))
    names = "+".join(share.pool.name for share in shares)
    limits = {is_async: [limits_of(share.pool, is_async=is_async) for share in shares] for is_async in (True, False)}
    members = {
        "name": names,
        "shares": tuple(shares),
        # What at least one of them enforces: which pool a task comes to is known when it comes.
        "limits": frozenset().union(*limits[True]),
        "def_limits": frozenset().union(*limits[False]),
    }
    return cast("type[Pool]", type("SeveralPools", (SeveralPools,), members))


def _read(item: str, text: str) -> Share:
    described, equals, queues = item.strip().partition("=")
    name, colon, slots = described.partition(":")
    # A shard's pool is its queue's.
    names = tuple(base_of(queue.strip()) for queue in queues.split("+"))
    is_number = slots.isascii() and slots.isdigit() and int(slots) > 0
    if not name or (colon and not is_number) or (equals and not all(names)):
        raise ConfigurationError(f"-P {text}: {item.strip()!r} is not {FORM}")
    return Share(find_pool(name.strip()), int(slots) if colon else None, names if equals else ())


def _check(shares: Sequence[Share], text: str) -> None:
    """Raises: ConfigurationError for pools that cannot be in one worker."""
    if len(shares) > 1:
        for share in shares:
            if share.pool.alone is not None:
                raise ConfigurationError(
                    f"-P {text}: {share.pool.name} must be the only pool of a worker: {share.pool.alone}"
                )
    classes = [share.pool for share in shares]
    for pool in classes:
        if classes.count(pool) > 1:
            raise ConfigurationError(
                f"-P {text}: {pool.name} is there twice. Give one the slots of both, and its queues slots by -Q (reports:2)"
            )
    if sum(not share.queues for share in shares) > 1:
        raise ConfigurationError(
            f"-P {text}: only one pool is for all other queues. Say the queues of the others: {FORM}"
        )
    queues = [queue for share in shares for queue in share.queues]
    twice = sorted({queue for queue in queues if queues.count(queue) > 1})
    if twice:
        raise ConfigurationError(f"-P {text}: {', '.join(twice)} can only be of one pool")


class SeveralPools(PoolDefaults):
    """See amqtask.pool.Pool. `several_pools` makes the classes, which have `shares`."""

    name: ClassVar[str]
    limits: ClassVar[frozenset[str]]

    def __init__(self, executor: Executor, loop: Loop, on_outcomes: OnOutcomes, options: PoolOptions) -> None:
        self._executor = executor
        self._members: tuple[Pool, ...] = tuple(
            share.pool(
                executor, loop, on_outcomes, options if share.slots is None else replace(options, slots=share.slots)
            )
            for share in self.shares
        )
        self._of_queue = {
            queue: pool for share, pool in zip(self.shares, self._members, strict=True) for queue in share.queues
        }
        self._first = self._members[0]
        # Tasks whose limits are not enforced, which was said.
        self._told: set[tuple[str, str]] = set()

    @classmethod
    def prepare_process(cls) -> None:
        for share in cls.shares:
            share.pool.prepare_process()

    @property
    def members(self) -> tuple[Pool, ...]:
        return self._members

    def member(self, queue: str) -> Pool:
        return self._of_queue.get(base_of(queue), self._first)

    def start(self) -> None:
        """Pools with processes first: what they fork should not have other pools' threads."""
        for pool in sorted(self._members, key=lambda pool: not pool.can_restart):
            pool.start()

    @property
    def slots(self) -> int:
        return sum(pool.slots for pool in self._members)

    @property
    def free(self) -> int:
        """Of all; ask the member of a queue whether it has room."""
        return sum(max(0, pool.free) for pool in self._members)

    def submit(self, request: Request) -> None:
        pool = self.member(request.queue)
        if request.hard_limit is not None or request.soft_limit is not None:
            self._look_at_limits(request, pool)
        pool.submit(request)

    def _look_at_limits(self, request: Request, pool: Pool) -> None:
        """Say once of a task that nobody enforces its limit here."""
        enforced = limits_of(type(pool), is_async=self._executor.is_async(request.task))
        for name, limit in (("hard", request.hard_limit), ("soft", request.soft_limit)):
            if limit is not None and name not in enforced and (request.task, name) not in self._told:
                self._told.add((request.task, name))
                logger.warning(
                    "task %s came from queue %s, and the %s pool has no %s time limits for it", request.task,
                    request.queue, pool.name, name,
                )  # fmt: skip

    def resize(self, slots: int) -> None:
        """The first one gets the slots that the others do not have; ask a member to resize another one."""
        self._first.resize(max(1, slots - sum(pool.slots for pool in self._members[1:])))

    def take_back(self) -> list[Request]:
        return [request for pool in self._members for request in pool.take_back()]

    def terminate(self, number: int, reason: str, signum: int | None = None) -> bool:
        return any(pool.terminate(number, reason, signum) for pool in self._members)

    def cancel(self, number: int, reason: str) -> None:
        for pool in self._members:
            pool.cancel(number, reason)

    def find(self, number: int) -> Running | None:
        return next((found for pool in self._members if (found := pool.find(number)) is not None), None)

    @property
    def can_restart(self) -> bool:
        return any(pool.can_restart for pool in self._members)

    def restart(self) -> None:
        for pool in self._members:
            if pool.can_restart:
                pool.restart()

    def stop(self) -> list[Request]:
        return [request for pool in self._members for request in pool.stop()]

    def stats(self) -> JsonObject:
        """Numbers for `inspect stats`: of all, and of each under `pools`."""
        pools: dict[str, Any] = {
            pool.name: {"queues": list(share.queues), **pool.stats()}
            for share, pool in zip(self.shares, self._members, strict=True)
        }
        processes = [pid for told in pools.values() for pid in told.get("processes", ())]
        return {"max-concurrency": self.slots, "pools": pools, **({"processes": processes} if processes else {})}


def _with_slots(options: PoolOptions, slots: int | None) -> PoolOptions:
    return options if slots is None else replace(options, slots=slots)
