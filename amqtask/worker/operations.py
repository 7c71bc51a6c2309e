"""Changes to a running worker, and questions about it: for remote control, and for the services on its loop.

All of it is called on the worker's loop.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Set
from typing import TYPE_CHECKING, NamedTuple

from amqtask.exceptions import ConfigurationError, NotRegistered
from amqtask.execution.request import CANCELLED
from amqtask.ground.printable import bounded_logger
from amqtask.topology.declarations import base_of
from amqtask.worker.intake import NEVER
from amqtask.worker.revoked import NOTHING

if TYPE_CHECKING:
    from amqtask.execution.request import Request
    from amqtask.ground.shapes import JsonObject
    from amqtask.pool import Pool, Running
    from amqtask.protocol.entities import Queue
    from amqtask.topology.slots import QueueSlots
    from amqtask.worker.options import WorkQueue
    from amqtask.worker.revoked import Stamp
    from amqtask.worker.worker import Worker

logger = bounded_logger("amqtask.worker")


class Terminated(NamedTuple):
    """Which requests were ended, and which run on because the pool cannot end them (or because they had just ended)."""

    ended: list[Request]
    going_on: list[Request]


class Operations:
    """Changes to one worker, and questions about it."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    # -- changes

    def revoke(self, task_ids: Iterable[str], *, tree: bool = False) -> list[Request]:
        """Revoke these tasks, and with `tree` all that belongs to them. Returns the requests that waited here and do not run."""
        self.note_revoked(task_ids, (), time.time(), tree=tree)
        return self.stop_revoked()

    def revoke_stamps(self, stamps: Iterable[Stamp]) -> list[Request]:
        """Revoke all tasks that carry one of these stamps. Returns like `revoke`."""
        self._worker.revoked.add_stamps(stamps, time.time())
        return self.stop_revoked()

    def learn_revoked(
        self, ids: Mapping[str, float], stamps: Mapping[Stamp, float], trees: Mapping[str, float] = NOTHING
    ) -> None:
        """Take over the revoked ids, stamps and trees of another worker, each with the time of its revoke."""
        self._worker.revoked.merge(ids, stamps, time.time(), trees)
        self.stop_revoked()

    def note_revoked(self, ids: Iterable[str], stamps: Iterable[Stamp], since: float, *, tree: bool = False) -> None:
        """Take over what was revoked at that Unix time; call `stop_revoked` after the last."""
        revoked = self._worker.revoked
        revoked.add(ids, since)
        revoked.add_stamps(stamps, since)
        if tree:
            revoked.add_trees(ids, since)

    def wake(self) -> None:
        """Do the gathered work at the end of this loop turn."""
        self._worker.wake()

    def stop_revoked(self) -> list[Request]:
        """Have what waits here and is revoked not run."""
        worker = self._worker
        worker.steps.look()
        covers = worker.revoked.covers
        stopped = [request for request in self.waiting() if covers(request.id, request.headers)]
        worker.dispatcher.watched.update((request.number, NEVER) for request in stopped)
        worker.wake()
        return stopped

    def ask_to_end(self, matches: Callable[[Request], bool]) -> None:
        """Ask the running requests that match to end; each is asked once."""
        stops = self._worker.setup.stops
        for request in self.running():
            if request.number not in stops and matches(request):
                stops.add(request.number)
                self._worker.pool.cancel(request.number, CANCELLED)

    def terminate(self, matches: Callable[[Request], bool], signum: int | None = None) -> Terminated:
        """End the running requests that match; prefork sends this signal (default TERM), and KILL after a second."""
        worker = self._worker
        matching, ended = [request for request in self.running() if matches(request)], []
        for request in matching:
            worker.report.terminating(request, signum or signal.SIGTERM)
            # In a batch there are others' calls, too.
            is_alone = worker.dispatcher.number_in_pool(request) == request.number
            if is_alone and worker.pool.terminate(request.number, "terminated", signum):
                ended.append(request)
                worker.report.revoked(request, terminated=True, signum=signum or signal.SIGTERM)
        worker.wake()
        return Terminated(ended, [request for request in matching if request not in ended])

    def set_rate_limit(self, task_name: str, limit: str | float | None) -> None:
        """Raises: NotRegistered, ConfigurationError."""
        self._check_registered(task_name)
        if self._worker.strategies[task_name].batch is not None:
            raise ConfigurationError(f"task {task_name} runs in batches, which have no rate limit")
        self._worker.throttle.set_rate(task_name, limit)
        self._worker.steps.look()
        self._worker.wake()

    def set_time_limits(self, task_name: str, *, soft: float | None, hard: float | None) -> None:
        """For requests received from now on. Raises: NotRegistered, ConfigurationError."""
        self._check_registered(task_name)
        for name, value in (("soft", soft), ("hard", hard)):
            if value is not None and name not in self._worker.pool.limits:
                raise ConfigurationError(f"the {self._worker.pool.name} pool has no {name} time limits")
        strategy = self._worker.strategies[task_name]
        strategy.soft_limit, strategy.hard_limit = soft, hard
        self._worker.steps.look(limits_changed=True)

    def pool(self, name: str | None = None) -> Pool:
        """One of the worker's pools; without a name the first. Raises: ConfigurationError."""
        pools = {pool.name: pool for pool in self._worker.pool.members}
        if name is None:
            return self._worker.pool.members[0]
        if name not in pools:
            raise ConfigurationError(f"this worker has no pool {name!r}; it has {', '.join(pools)}")
        return pools[name]

    def resize(self, slots: int, pool: Pool | None = None) -> int:
        """Change the number of slots (at least one) of a pool (the first); the prefetch windows follow. Returns the number."""
        worker, slots = self._worker, max(1, slots)
        (pool or self.pool()).resize(slots)
        worker.windows.resize()
        worker.wake()
        return slots

    def scale(self, slots: int) -> None:
        """Change the number of slots, but not the windows (autoscale: they are sized for its maximum)."""
        self.pool().resize(slots)
        self._worker.wake()

    def restart_pool(self, reload: Callable[[], set[str]]) -> None:
        """Import what `reload` imports (it returns the names of tasks that changed), then replace the pool's processes.

        Raises: ConfigurationError where there are no processes, or when a module cannot be imported.
        """
        worker = self._worker
        if not worker.pool.can_restart:
            raise ConfigurationError(f"the {worker.pool.name} pool has no processes to replace; restart the worker")
        for name in reload():
            worker.strategies.forget(name)
        worker.pool.restart()
        worker.wake()

    def consume(self, queue: Queue, dead_letter: Queue | None, slots: QueueSlots | None = None) -> bool:
        """Consume one more queue, unless it is consumed already; with slots of its own, if they are given. False: it is paused,
        and consumed when it is resumed. Raises: ConfigurationError (so many cannot be kept free)."""
        own = self._own_of(queue)
        if own is not None:
            queue, dead_letter = own
        if slots is not None:
            self._worker.divide(queue.name, slots)
        if queue.name in self._worker.windows.by_queue:
            return True
        is_consumed = self._worker.lifecycle.consume(queue, dead_letter)
        self._worker.windows.resize()
        return is_consumed

    def _own_of(self, queue: Queue) -> WorkQueue | None:
        """The queue that this worker has of this broadcast already: with a second one it would run everything twice."""
        for work in self._worker.work_queues.values() if queue.broadcast else ():
            own = work.queue
            if own.broadcast and (own.exchange, own.routing_key) == (queue.exchange, queue.routing_key):
                return work
        return None

    def pause(self, queue: str) -> bool:
        """Consume a queue no more until `resume`, and requeue what has not begun. False: it was not consumed."""
        was_consumed = [self._pause(name) for name in self._with_shards(queue)]
        if not any(was_consumed):
            return False
        logger.warning("worker: queue %s is paused", queue)
        return True

    def _with_shards(self, queue: str) -> list[str]:
        known = self._worker.work_queues.keys() | self._worker.lifecycle.paused.keys()
        shards = f"{queue}.fair."
        # Of a broadcast it has a queue of its own, which nobody else can name.
        own = [
            name
            for name, work in self._worker.work_queues.items()
            if work.queue.broadcast and work.queue.exchange is not None and work.queue.exchange.name == queue
        ]
        return [queue, *own, *sorted(name for name in known if name.startswith(shards) and base_of(name) == queue)]

    def _pause(self, queue: str) -> bool:
        worker = self._worker
        work = worker.work_queues.get(queue) if queue in worker.windows.by_queue else None
        worker.lifecycle.paused.setdefault(queue, work)
        if not self._cancel(queue):
            return False
        acks_early = worker.deliveries.acks_early

        def is_meant(request: Request) -> bool:
            return request.queue == queue and request.first is None and request.number not in acks_early

        unbegun = worker.dispatcher.take_unbegun(is_meant)
        line = worker.dispatcher.take_line(
            queue, allowed=lambda request: request.queue == queue and request.first is None, limit=sys.maxsize
        )
        line += worker.dispatcher.next_in_line.take(is_meant)
        worker.deliveries.give_back(unbegun + line + worker.dispatcher.take_batches(queue))
        worker.wake()
        return True

    def resume(self, queue: str) -> bool:
        """Consume a paused queue again. False: it is none of this worker's."""
        lifecycle = self._worker.lifecycle
        resumed = [work for name in self._with_shards(queue) if (work := lifecycle.paused.pop(name, None)) is not None]
        if not resumed:
            return False
        logger.warning("worker: queue %s is resumed", queue)
        are_consumed = [lifecycle.consume(*work) for work in resumed]
        return any(are_consumed)

    def keep_paused(self, names: Set[str]) -> None:
        """Exactly these queues are paused: what the broker says now. Most of them may be others'."""
        paused = self._worker.lifecycle.paused
        known = {*self._worker.work_queues, *(name for name, work in paused.items() if work is not None)}
        known |= set(map(base_of, known))
        # A queue comes before its shards, which are resumed with it.
        for queue in sorted(known & paused.keys()):
            if queue not in names and base_of(queue) not in names:
                self.resume(queue)
        for queue in (known & names) - paused.keys():
            self.pause(queue)
        for queue in paused.keys() - known - names:
            del paused[queue]
        paused.update(dict.fromkeys(names - known))

    def cancel(self, queue: str) -> bool:
        """Take no more deliveries from a queue; those that are here still run. False: it was not consumed."""
        were_consumed = [self._cancel(name) for name in self._with_shards(queue)]
        return any(were_consumed)

    def _cancel(self, queue: str) -> bool:
        if queue not in self._worker.windows.by_queue:
            paused = self._worker.lifecycle.paused
            if paused.get(queue) is not None:
                paused[queue] = None  # when it is resumed, others consume it
            return False
        self._worker.consumer.cancel_queue(queue)
        self._worker.windows.remove(queue)
        self._worker.division.leaves(queue)
        self._worker.windows.resize()
        return True

    def shut_down(self) -> None:
        """Shut down warmly, as TERM does."""
        self._worker.lifecycle.shutdown.warm("remote control")

    def _check_registered(self, task_name: str) -> None:
        strategy = self._worker.strategies[task_name]
        if strategy.task is None:
            raise NotRegistered(strategy.problem)

    # -- questions

    def running(self) -> list[Request]:
        """All requests that the pool has, also those that have not begun."""
        return self._worker.dispatcher.running_calls()

    def active(self) -> list[Request]:
        """The requests that have begun."""
        return [request for request in self.running() if self.find(request) is not None]

    def reserved(self) -> list[Request]:
        """The requests that are here and have not begun."""
        active = {request.number for request in self.active()}
        return [request for request in (*self._worker.dispatcher, *self.running()) if request.number not in active]

    def waiting(self) -> list[Request]:
        return [*self._worker.dispatcher, *self._worker.intake.soon]

    def soon(self) -> list[Request]:
        """The requests that wait here for an ETA that is near."""
        return self._worker.intake.soon

    @property
    def backlog(self) -> int:
        """How many slots would let all tasks run that are here and may."""
        return self._worker.dispatcher.needed

    def stats(self) -> JsonObject:
        """Numbers about the worker itself (the panel adds the process's)."""
        worker = self._worker
        totals = {name: strategy.count for name, strategy in worker.strategies.items() if strategy.count}
        return {
            "total": totals,
            "pool": {**self._pool_defaults(), **worker.pool.stats()},
            "prefetch_count": sum(window.current for window in worker.windows.by_queue.values()),
            "prefetch": {queue: window.current for queue, window in worker.windows.by_queue.items()},
            "waiting": worker.dispatcher.waiting,
            "unconfirmed": worker.publisher.outstanding,
            "paused": self._paused(),
            **({"slots": worker.division.stats()} if worker.division else {}),
        }

    def _paused(self) -> list[str]:
        """Without the shards of paused queues."""
        paused = self._worker.lifecycle.paused
        return sorted(name for name in paused if base_of(name) == name or base_of(name) not in paused)

    def _pool_defaults(self) -> JsonObject:
        """Numbers that Celery's tools expect of every pool."""
        worker = self._worker
        return {
            "implementation": worker.pool.name,
            "max-concurrency": worker.pool.slots,
            "processes": [os.getpid()],
            "max-tasks-per-child": "N/A",
            "put-guarded-by-semaphore": False,
            "timeouts": [worker.setup.soft_time_limit or 0, worker.setup.time_limit or 0],
            "writes": "N/A",
        }

    def start_of(self, request: Request) -> float | None:
        """The Unix time at which the request began; exact to a quarter of a second where the pool does not record it."""
        running = self.find(request)
        if running is not None and running.since is not None:
            return time.time() - (time.monotonic() - running.since)
        lifecycle = self._worker.lifecycle
        number = self._worker.dispatcher.number_in_pool(request)
        if number not in lifecycle.running_since:
            lifecycle.note_starts()
        return lifecycle.running_since.get(number)

    def find(self, request: Request) -> Running | None:
        """Where the request runs; None if it has not begun."""
        return self._worker.pool.find(self._worker.dispatcher.number_in_pool(request))
