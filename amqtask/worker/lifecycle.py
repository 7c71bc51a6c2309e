"""A worker's life: the order in which its parts start and close, and the signals in between."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from amqtask import signals
from amqtask.ground.loop import Ticker
from amqtask.ground.printable import bounded_logger, count
from amqtask.topology.declarations import base_of
from amqtask.worker.options import WorkQueue
from amqtask.worker.report import name_of
from amqtask.worker.revoked import StateFile
from amqtask.worker.shutdown import EX_FAILURE, Degree, Shutdown, SignalHandlers

if TYPE_CHECKING:
    from amqtask.pool import Pool
    from amqtask.protocol.entities import Queue
    from amqtask.protocol.message import Message
    from amqtask.transport.contract import Consumer, LoopPublisher
    from amqtask.worker.deliveries import Deliveries
    from amqtask.worker.dispatcher import Dispatcher, Surplus
    from amqtask.worker.division import Division
    from amqtask.worker.finisher import Finisher, Lost
    from amqtask.worker.lines import Throttle
    from amqtask.worker.options import RunnableLoop, Service, WorkerSetup
    from amqtask.worker.prefetch import Windows
    from amqtask.worker.revoked import Revocations
    from amqtask.worker.workflows import ChordJoiner, Steps

logger = bounded_logger("amqtask.worker")

BUSY_CHECK_SECONDS = 0.25
# So long may a broker answer no publish before windows grow all the same. Its node may have lost the others, which the consumer
# finds out, and leaves it; and where it consumes there, to change a window, the channel stands still for a minute, and keeps all
# its consumers and what they are given (RabbitMQ 4.3: `rabbit_fifo_client:checkout`).
SILENT_SECONDS = 10.0
# A connection that does not close within so many seconds is left to the operating system.
CLOSE_SECONDS = 2.0
# After so many seconds without a confirm a stopping worker waits for confirms no longer.
CONFIRM_SECONDS = 15.0
# Tasks in the log line that says what a shutdown waits for.
MOST_TOLD = 5


class Living(Protocol):
    """The worker's members that its lifecycle needs."""

    setup: WorkerSetup
    loop: RunnableLoop
    pool: Pool
    publisher: LoopPublisher
    consumer: Consumer
    chord_joiner: ChordJoiner | None
    windows: Windows
    throttle: Throttle
    steps: Steps
    division: Division
    deliveries: Deliveries
    dispatcher: Dispatcher
    surplus: Surplus
    finisher: Finisher
    revoked: Revocations
    lost: Lost
    # Tasks that have ended.
    ended: int
    # It takes no more deliveries.
    is_quiet: bool

    def add_queue(self, queue: Queue, dead_letter: Queue | None) -> None:
        """Note a queue and its dead-letter queue, before its first delivery."""

    def wake(self) -> None:
        """Do the gathered work at the end of this loop turn."""

    def quiet(self) -> None:
        """Take no more deliveries; requeue the requests that do not run yet."""

    def abandon(self) -> None:
        """End running requests now, and requeue them."""


class Lifecycle:
    """Starts and stops one worker; `services` start after it and stop before its connections do."""

    def __init__(
        self, worker: Living, services: Sequence[Service], clock: Callable[[], float] = time.monotonic
    ) -> None:
        setup = worker.setup
        self._clock = clock
        self._worker = worker
        self._setup = setup
        self._loop = worker.loop
        self.services = tuple(services)
        self.started_at = time.time()
        self.is_ready = False
        self._is_consuming = self._is_held_back = False
        self.shutdown = Shutdown(self, worker.loop, setup)
        self._handlers = SignalHandlers(worker.loop, self.shutdown.on_signal)
        self._busy_check = Ticker(worker.loop, BUSY_CHECK_SECONDS, self.look_at_long_tasks)
        self._orphans = Ticker(worker.loop, LOOK_FOR_ZOMBIES_EVERY, Orphans().reap) if os.getpid() == 1 else None
        # To be consumed from the start.
        self.queues = setup.queues
        # How many had ended when all slots were first seen busy with the present tasks, and when that was.
        self._ended_before = 0
        self._busy_since: float | None = None
        # How often the broker had answered publishes at the last look, and since when it answers none.
        self._oldest: Message | None = None
        self._answered_at = clock()
        # How many waited for confirms then.
        self._waits = 0
        # The unconfirmed messages when a stopping worker last looked, and since when there was no confirm.
        self._unconfirmed = (0, 0)
        self._unconfirmed_since: float | None = None
        # Unix time at which a running request was first seen running, exact to a quarter of a second: to measure each start would
        # cost every task time for a rare question.
        self.running_since: dict[int, float] = {}
        # The queues that nobody is to consume now, by name; with those that this worker would consume.
        self.paused: dict[str, WorkQueue | None] = dict.fromkeys(setup.paused)
        self._state = StateFile(setup.statedb, worker.revoked) if setup.statedb else None

    def run(self) -> int:
        """Run the worker from start to end; the exit code."""
        if signals.worker_init:
            signals.worker_init.send(sender=self._worker)
        try:
            self._start()
            self._loop.run()
        except BaseException:  # whatever ends it, the exit code says so
            self.shutdown.exit_code = EX_FAILURE
            raise
        finally:
            self._end()
        return self.shutdown.exit_code

    def _start(self) -> None:
        """Start the pool first: its children must not inherit the broker's sockets."""
        worker, setup = self._worker, self._setup
        if self._state is not None:
            self._state.load()
        worker.pool.start()
        if setup.install_signals:
            self._handlers.install()
        for name, limit in setup.rate_limits.items():
            worker.throttle.set_rate(name, limit)
        worker.steps.look()
        worker.publisher.start()
        for queue, dead_letter in self.queues:
            self.consume(queue, dead_letter)
        worker.consumer.start()
        self._busy_check.start()
        if self._orphans is not None:
            self._orphans.start()
        for service in self.services:
            service.start()

    def consume(self, queue: Queue, dead_letter: Queue | None) -> bool:
        """Consume one more queue. False: it is paused, and waits here until it is resumed."""
        worker = self._worker
        if queue.name in self.paused or base_of(queue.name) in self.paused:
            self.paused[queue.name] = WorkQueue(queue, dead_letter)
            return False
        worker.add_queue(queue, dead_letter)
        window = worker.windows.add(queue.name)
        worker.consumer.add_queue(queue, prefetch=window.current, dead_letter=dead_letter)
        return True

    def hold_back(self) -> None:
        """The worker is not ready before it takes commands: until `let_go`."""
        self._is_held_back = True

    def let_go(self) -> None:
        """It takes commands, or will not take any for now."""
        self._is_held_back = False
        self._look_whether_ready()

    def note_consuming(self) -> None:
        """All queues are consumed (again); the first time the worker is ready."""
        self._is_consuming = True
        self._look_whether_ready()

    def _look_whether_ready(self) -> None:
        if self._is_consuming and not self._is_held_back and not self.is_ready:
            self.is_ready = True
            logger.warning("%s ready.", self._setup.hostname)
            if signals.worker_ready:
                signals.worker_ready.send(sender=self._worker)

    def _end(self) -> None:
        for service in self.services:
            service.stop()
        self._busy_check.stop()
        if self._orphans is not None:
            self._orphans.stop()
        self._worker.pool.stop()
        self._handlers.restore()
        if self._state is not None:
            self._state.save()
        if signals.worker_shutdown:
            signals.worker_shutdown.send(sender=self._worker)
        self._loop.close()

    def look_at_long_tasks(self) -> None:
        """Update windows, revokes and the state file; called every BUSY_CHECK_SECONDS."""
        worker = self._worker
        self.note_starts()
        self._look_whether_nothing_ends()
        if not worker.is_quiet:
            worker.surplus.look(worker.windows.are_long)
        self._make_room()
        worker.revoked.purge(time.time())
        if self._state is not None:
            self._state.save_soon()
        worker.wake()

    def _make_room(self) -> None:
        """Let ended tasks that wait for confirms, and calls that are next for a place, keep no others out; but not while the
        broker may have lost a majority."""
        worker, now = self._worker, self._clock()
        near = worker.dispatcher.next_in_line.look_for_room()
        # Room for those that wait for confirms is made a look later: what the broker has answered since then shows that it works.
        before, self._waits = self._waits, worker.finisher.look_for_long_waits()
        # The confirm of a younger message is no answer: its queue may be on the node that has lost the others.
        oldest = worker.publisher.oldest
        if oldest is None or oldest is not self._oldest:
            self._oldest, self._answered_at = oldest, now
        elif now - self._answered_at < SILENT_SECONDS:
            return
        worker.windows.hold(min(before, self._waits) + len(worker.lost) + near)

    def _look_whether_nothing_ends(self) -> None:
        worker, now = self._worker, self._clock()
        if worker.division:
            worker.windows.look_at_full(worker.division.is_full, now)
        # Not what the pool says is free: it takes more than it has slots while tasks are short.
        if len(worker.dispatcher.running) < worker.pool.slots:
            self._busy_since = None
        elif self._busy_since is None or worker.ended != self._ended_before:
            self._ended_before, self._busy_since = worker.ended, now
        else:
            worker.windows.nothing_ends(now - self._busy_since)

    def note_starts(self) -> None:
        """Bring `running_since` up to date."""
        now, started = time.time(), self.running_since
        self.running_since = {number: started.get(number, now) for number in self._worker.dispatcher.running}

    # -- for the shutdown

    @property
    def is_busy(self) -> bool:
        return bool(self._worker.dispatcher.running)

    @property
    def is_settled(self) -> bool:
        worker = self._worker
        if worker.dispatcher.running:
            return False
        unconfirmed = len(worker.finisher.confirming), worker.publisher.outstanding
        return not any(unconfirmed) or self._has_waited_enough(unconfirmed)

    @property
    def waits_for(self) -> str:
        worker = self._worker
        running = list(worker.dispatcher.running.values())
        if not running:
            return f"the broker's confirms (results, retries, dead letters): {worker.publisher.outstanding} to come"
        self.note_starts()
        running.sort(key=lambda request: self.running_since[request.number])
        now = time.time()
        descriptions = [
            f"{name_of(request)}[{request.id}] ({max(0, now - self.running_since[request.number]):.0f} s)"
            for request in running[:MOST_TOLD]
        ]
        suffix = f" and {len(running) - MOST_TOLD} more" if len(running) > MOST_TOLD else ""
        return f"{count(len(running), 'task')}: {', '.join(descriptions)}{suffix}"

    def _has_waited_enough(self, unconfirmed: tuple[int, int]) -> bool:
        """Whether a stopping worker, in which no task runs any more, has waited long enough for confirms."""
        now = self._clock()
        if unconfirmed != self._unconfirmed or self._unconfirmed_since is None:
            self._unconfirmed, self._unconfirmed_since = unconfirmed, now
        if self.shutdown.degree < Degree.WARM or now - self._unconfirmed_since < CONFIRM_SECONDS:
            return False
        requests, messages = unconfirmed
        logger.error(
            "worker: stops although the broker has confirmed no message (results, retries, dead letters) for %.0f s; "
            "%s not confirmed, and the deliveries of %s go back to their queues",
            now - self._unconfirmed_since, count(messages, "message"), count(requests, "task"),
        )  # fmt: skip
        return True

    def quiet(self) -> None:
        self._worker.quiet()

    def abandon(self) -> None:
        self._worker.abandon()

    def close(self) -> None:
        """Send the answers, close the connections, then end the loop."""
        worker = self._worker
        worker.deliveries.flush()
        for service in self.services:
            service.stop()
        worker.publisher.stop()
        if worker.chord_joiner is not None:
            worker.chord_joiner.stop()
        worker.consumer.stop(on_stopped=self._loop.stop)
        self._loop.call_later(CLOSE_SECONDS, self._loop.stop)

    def halt(self) -> None:
        self._loop.stop()


# -- For a worker that is process 1, a container's only program: the kernel gives it all orphaned processes, which it has to
# reap.
#
# An orphan cannot be told from a child that a task is about to wait for; a process that has been a zombie for ZOMBIE_SECONDS
# counts as one.

# Seconds.
ZOMBIE_SECONDS = 30.0
LOOK_FOR_ZOMBIES_EVERY = 10.0


class Orphans:
    """`reap` reaps the processes that have been zombies for ZOMBIE_SECONDS."""

    def __init__(self) -> None:
        self._since: dict[int, float] = {}

    def reap(self) -> None:
        """Look now; cheap, and it never blocks."""
        now, own_pid = time.monotonic(), os.getpid()
        zombies = [pid for pid in self._pids() if self._is_zombie_of(pid, own_pid)]
        self._since = {pid: self._since.get(pid, now) for pid in zombies}
        for pid, since in self._since.items():
            if now - since >= ZOMBIE_SECONDS:
                try:
                    os.waitpid(pid, os.WNOHANG)
                except ChildProcessError:
                    pass  # another thread has reaped it meanwhile

    def _pids(self) -> list[int]:
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]

    def _is_zombie_of(self, pid: int, parent: int) -> bool:
        try:
            # "pid (name) state ppid …", where the name may have any characters.
            state, ppid = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
        except (OSError, ValueError):
            return False
        return state == "Z" and int(ppid) == parent
