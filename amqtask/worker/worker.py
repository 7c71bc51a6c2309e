"""The worker: the one page on which the life of a delivery can be read.

    on_delivery ─► (intake: redelivered, timed, revoked, unknown …) ─► dispatcher ─► pool
                                                                                     │ Outcome
    deliveries.answer ◄───────────────────────────────── finisher (publish, confirm) ◄┘ on_outcomes

Every delivery gets exactly one answer on the channel it came on (deliveries.py), after all messages of its outcome are
confirmed; or its channel is lost, and the broker delivers it again.

All of it runs on one thread, the I/O loop's. Work is gathered per loop turn: deliveries and outcomes are only noted;
`_turn` fills the slots, sends the acks and looks at the prefetch windows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from amqtask import states
from amqtask.exceptions import InvalidTaskError, MessageError
from amqtask.execution.request import HELD, Answer
from amqtask.flow.contract import SHORTEST
from amqtask.flow.keys import TICKETS
from amqtask.ground.plugins import WithListedNames
from amqtask.ground.printable import bounded_logger
from amqtask.topology.declarations import base_of
from amqtask.transport.contract import HostLeft, held_too_long
from amqtask.worker.deliveries import Deliveries
from amqtask.worker.dispatcher import Dispatcher, Surplus
from amqtask.worker.division import Division
from amqtask.worker.finisher import Finisher, Lost
from amqtask.worker.follow_ups import FollowUpPublisher
from amqtask.worker.intake import Intake
from amqtask.worker.lifecycle import Lifecycle
from amqtask.worker.lines import MOST_HELD, Throttle
from amqtask.worker.options import WorkQueue, WorkQueues
from amqtask.worker.prefetch import Windows
from amqtask.worker.revoked import Revocations
from amqtask.worker.strategy import Strategies, bare_request, read_request, read_strange, without_end
from amqtask.worker.workflows import Steps, delivered

if TYPE_CHECKING:
    from amqtask.execution.no_run import Endings
    from amqtask.execution.request import Outcome, Request
    from amqtask.pool import OnOutcomes, Pool
    from amqtask.protocol.chord import ChordPart
    from amqtask.protocol.entities import Queue
    from amqtask.protocol.message import Delivery, Message
    from amqtask.topology.slots import QueueSlots
    from amqtask.transport.contract import Consumer, ConsumerListener, LoopPublisher
    from amqtask.worker.follow_ups import OnDone
    from amqtask.worker.options import RunnableLoop, Service, WorkerSetup
    from amqtask.worker.report import Observer, Report
    from amqtask.worker.workflows import ChordJoiner

logger = bounded_logger("amqtask.worker")


class Worker(WithListedNames, others_names="blueprint hostname pid start timer"):
    """Takes deliveries, runs them in a pool, answers them. For start and stop see lifecycle.py, for changes operations.py."""

    def __init__(
        self,
        setup: WorkerSetup,
        *,
        loop: RunnableLoop,
        publisher: LoopPublisher,
        endings: Endings,
        report: Report,
        make_pool: Callable[[OnOutcomes], Pool],
        make_consumer: Callable[[ConsumerListener], Consumer],
        chord_joiner: ChordJoiner | None = None,
        services: Callable[[Worker], Sequence[Service]] = lambda worker: (),
        clock: Callable[[], float] = time.monotonic,
        app: object = None,
    ) -> None:
        # For receivers of signals; the worker itself does not use it.
        self.app: Any = app
        self.setup = setup
        self.loop = loop
        self.publisher = publisher
        self.chord_joiner = chord_joiner
        self.report = report
        self._has_batches = any(task.batch is not None for task in setup.tasks.values())
        self.pool = make_pool(self._on_batches if self._has_batches else self.on_outcomes)
        self.consumer = make_consumer(self)
        self.work_queues = WorkQueues(setup.queues, setup.delivery_limit)
        self.strategies = Strategies(setup.tasks, hard_limit=setup.time_limit, soft_limit=setup.soft_time_limit)
        consumed = {work.queue.name for work in setup.queues} - setup.paused
        self.division = Division(self.pool, setup.queue_slots, consumed, setup.most_slots)
        self.revoked = Revocations(
            max_ids=setup.revokes_max, expires=setup.revoke_expires, perhaps=setup.perhaps_revoked
        )
        self.deliveries = Deliveries(self.consumer, unanswered=self._unanswered, changed=self.wake)
        self.lost = Lost(self.loop, self.work_queues, self.deliveries.answer)
        self.following = FollowUpPublisher(
            publisher, self.loop, endings, add_part=self._add_part, is_stopping=lambda: self.is_quiet
        )
        self.finisher = self._make_finisher()
        self.intake = self._make_intake(endings)
        self._clock = clock
        self.throttle = self._make_throttle()
        self.dispatcher = self._make_dispatcher()
        self.surplus = Surplus(
            self.dispatcher, self.deliveries, self.work_queues, self.division, latest=lambda: self._number, clock=clock
        )
        self.windows = Windows(self.consumer, self.division, self.surplus, pinned=setup.prefetch)
        self.steps = self._make_steps()
        # How many requests ended since the start.
        self.ended = 0
        self.is_quiet = False
        self._has_left_host = False
        # Other connections of this worker that go to a host with its consumer: called with its URL and a reason.
        self.followers: list[Callable[[str, str], None]] = [publisher.go_to]
        self._number = 0
        self._turn_is_due = False
        self.lifecycle = Lifecycle(self, services(self), clock)

    # -- its parts, which know each other by their methods alone

    def _make_finisher(self) -> Finisher:
        return Finisher(
            following=self.following,
            answer=self.deliveries.answer,
            requeue=self._requeue_unconfirmed,
            work_queues=self.work_queues,
            report=self.report,
            hostname=self.setup.hostname,
            replace=self.consumer.replace,
        )

    def _make_intake(self, endings: Endings) -> Intake:
        return Intake(
            self.setup,
            loop=self.loop,
            work_queues=self.work_queues,
            deliveries=self.deliveries,
            lost=self.lost,
            finisher=self.finisher,
            revoked=self.revoked,
            report=self.report,
            endings=endings,
            ready=self._enqueue,
        )

    def _make_throttle(self) -> Throttle:
        pinned = self.setup.prefetch
        # A pinned window cannot grow for requests that are held: they get its part beyond the slots.
        most_held = MOST_HELD if pinned is None else max(0, min(MOST_HELD, pinned - self.division.slots))
        return Throttle(
            self.intake.delay,
            on_limited=lambda request: self.windows.widen(request.queue, most_held),
            most_held=most_held,
        )

    def _make_steps(self) -> Steps:
        return Steps(
            self.setup,
            strategies=self.strategies,
            throttle=self.throttle,
            revoked=self.revoked,
            consumed=self.windows.by_queue,
            clock=self._clock,
        )

    def _make_dispatcher(self) -> Dispatcher:
        return Dispatcher(
            pool=self.pool,
            loop=self.loop,
            throttle=self.throttle,
            report=self.report,
            admit=self.intake.admit,
            acks_early=self.deliveries.acks_early,
            accepted=self.deliveries.ack_early,
            turned_away=self._turn_away,
            slots=lambda: self.concurrency,
            division=self.division,
            has_batches=self._has_batches,
            clock=self._clock,
        )

    @property
    def queues(self) -> tuple[Queue, ...]:
        """All queues that it consumes or has consumed: requests of the latter may still be running."""
        return tuple(work.queue for work in self.work_queues.values())

    @property
    def consumed(self) -> tuple[Queue, ...]:
        """The queues that it consumes now."""
        return tuple(queue for queue in self.queues if queue.name in self.windows.by_queue)

    @property
    def concurrency(self) -> int:
        """How many tasks may run at once (with autoscale: the maximum)."""
        return self.division.slots

    def run(self) -> int:
        """Work until the shutdown; the exit code (0 after a warm shutdown, else 1)."""
        return self.lifecycle.run()

    def stop(self) -> None:
        """Shut down warmly, as TERM does; from any thread, or from a signal's receiver."""
        self.loop.call_soon_threadsafe(lambda: self.lifecycle.shutdown.warm("stop()"))

    # -- observers

    def observe(self, observer: Observer) -> None:
        """Call the methods that `observer` overrides from now on; on the loop's thread. Adding it twice changes nothing."""
        self.report.add(observer)
        self.dispatcher.look_at_report()

    def unobserve(self, observer: Observer) -> None:
        """Stop calling this observer; harmless when it was not added."""
        self.report.remove(observer)
        self.dispatcher.look_at_report()

    # -- a delivery comes

    def on_delivery(self, delivery: Delivery) -> None:
        """The hot path: a plain message becomes a Request that is appended to its queue's line."""
        self.deliveries.came(delivery)
        self._number += 1
        try:
            headers = delivery.properties.headers
            name = headers.get("task") if headers.__class__ is dict else None
            if name.__class__ is not str or self.is_quiet:
                self._take_strange(delivery)
                return
            strategy = self.strategies[name]
            request = read_request(delivery, self._number, name, strategy)
            if (
                delivery.redelivered
                or not strategy.is_plain
                or (self.revoked and self.revoked.covers(request.id, headers))
                or headers.get("eta") is not None
                or headers.get("expires") is not None
            ):
                if self.report.sees_received:
                    self.report.received(request, is_to_run=False)  # so far
                if not self.intake.examine(request, strategy, self.dispatcher.watched):
                    return
            elif self.report.sees_received:
                self.report.received(request, is_to_run=True)
            if not strategy.acks_late:
                self.deliveries.acks_early.add(request.number)
        except MessageError as error:
            self.intake.refuse(bare_request(delivery, self._number), error)
            return
        except Exception as exc:  # a message that nobody thought of must not end the worker
            logger.exception("a message on %s cannot be read", delivery.queue)
            self.intake.refuse(bare_request(delivery, self._number), InvalidTaskError(repr(exc)))
            return
        self.dispatcher.add(request)
        self.wake()

    def _take_strange(self, delivery: Delivery) -> None:
        """A delivery of an old channel, or of protocol v1, or no task message at all."""
        if self.is_quiet:
            self.deliveries.give_back_delivery(delivery)
            return
        request, error = read_strange(delivery, self._number, self.setup.accept)
        if error is not None:
            self.intake.refuse(request, error)
            return
        strategy = self.strategies[request.task]
        if request.hard_limit is None:
            request.hard_limit = strategy.hard_limit
        if request.soft_limit is None:
            request.soft_limit = strategy.soft_limit
        if self.report.sees_received:
            self.report.received(request, is_to_run=False)  # so far
        if self.intake.examine(request, strategy, self.dispatcher.watched):
            self._enqueue(request)

    def _enqueue(self, request: Request) -> None:
        strategy = self.strategies[request.task]
        if not strategy.acks_late:
            self.deliveries.acks_early.add(request.number)
        # On its last run it is alone, not with calls that may be innocent.
        if strategy.batch is not None and self._has_batches and not self.work_queues.is_last_run(request):
            window = self.windows.by_queue.get(request.queue)
            if window is not None:
                window.batch = max(window.batch, strategy.batch.size)
            self.dispatcher.gather(request, strategy)
        else:
            self.dispatcher.add(request)
        self.wake()

    def wake(self) -> None:
        """Run `_turn` at the end of this loop turn."""
        if not self._turn_is_due:
            self._turn_is_due = True
            self.loop.call_soon(self._turn)

    # -- an outcome comes

    def _on_batches(self, outcomes: Sequence[Outcome]) -> None:
        self.on_outcomes(self.dispatcher.end_batches(outcomes))

    def on_outcomes(self, outcomes: Sequence[Outcome]) -> None:
        """The pool's slots have outcomes of their requests."""
        self.deliveries.look_at_channel()
        running, windows, report = self.dispatcher.running, self.windows.by_queue, self.report
        plain: list[Request] = []
        for outcome in outcomes:
            request = running.pop(outcome.number, None)
            if request is None:
                logger.debug("an outcome for number %s, which does not run", outcome.number)
                continue
            window = windows.get(request.queue)
            if window is not None and outcome.runtime > 0:  # a lost task has no runtime
                window.total += outcome.runtime
                window.count += 1
            self.strategies[request.task].count += 1
            if request.places and outcome.state != HELD:
                self.dispatcher.next_in_line.freed(request.places)
            if report.sees_success or outcome.state != states.SUCCESS:
                report.ended(request, outcome)
            if outcome.going_on is not None:
                self._gone_on(request, outcome.publish[0], outcome.going_on)
            elif outcome.result is None and outcome.answer is Answer.ACK and not outcome.publish and not outcome.parts:
                plain.append(request)
            elif not (outcome.is_step and self._go_on(request, outcome.publish[0])):
                self._finish(request, outcome)
        self.deliveries.ack(plain)
        self.ended += len(outcomes)
        self.wake()

    def _go_on(self, request: Request, message: Message) -> bool:
        """Run the next step of a chain here, without the broker. False: it must be published."""
        is_present = self.deliveries.is_present(request)
        if not is_present or self.is_quiet or request.number in self.deliveries.acks_early:
            return False
        step = self.steps.request(request, message, self._number + 1)
        if step is None:
            return False
        self._number += 1
        is_revoked = self.revoked and self.revoked.covers(step.id, step.headers)
        if self.report.sees_received:
            self.report.received(step, is_to_run=not is_revoked)
        if is_revoked:
            self.intake.examine(step, self.strategies[step.task], self.dispatcher.watched)
        else:
            self.dispatcher.add(step)
        return True

    def _gone_on(self, request: Request, message: Message, step: Request) -> None:
        """A slot runs the next step already."""
        self.steps.gone_on(request, message, step)
        self.dispatcher.running[step.number] = step
        if self.report.sees_received:
            self.report.received(step, is_to_run=True)
        if self.report.sees_started:
            self.report.started(step)

    def _hold(self, request: Request, outcome: Outcome) -> None:
        """A limit has no room for it: for a moment it waits here, for longer in the broker."""
        near, tickets = self.dispatcher.next_in_line, {TICKETS: outcome.tickets} if outcome.tickets else {}
        is_kept = self.deliveries.is_present(request) and request.number not in self.deliveries.acks_early
        room = 0 if self.is_quiet else self.windows.room_beside(request.queue)
        if not (tickets and is_kept and near.takes(outcome.pause, room)):
            self.intake.delay(request, outcome.pause, tickets)
            return
        request.headers = {**request.headers, **tickets}
        request.places = outcome.places
        self.intake.watch(request, self.dispatcher.watched)
        near.add(request, outcome.pause, min(outcome.tickets.values()))

    def _turn_away(self, request: Request) -> None:
        self.intake.delay(request, SHORTEST, {TICKETS: request.headers[TICKETS]})

    def _finish(self, request: Request, outcome: Outcome) -> None:
        if outcome.state == HELD:
            self._hold(request, outcome)
            return
        if outcome.answer is Answer.REQUEUE:
            if outcome.summary:
                # A requeued request has a summary only if its process was lost or it ran into a time limit.
                self._retry_lost(request, outcome)
                return
            if outcome.pause > 0:
                self.intake.delay(request, outcome.pause)
                return
        self.finisher.finish(request, outcome)

    def _retry_lost(self, request: Request, outcome: Outcome) -> None:
        """Its process died, or it ran into its time limit, and it should run again."""
        first = delivered(request)
        if self.lost.is_last(first) and request is first:
            self.intake.dead_letter(request, without_end(request.attempts + 1, outcome.reason))
        elif self.is_quiet or not self.deliveries.is_present(request):
            self.deliveries.answer(request, Answer.REQUEUE)
        else:
            self.lost.hold(request)

    def _add_part(self, part: ChordPart, on_done: OnDone) -> None:
        if self.chord_joiner is None:
            raise AssertionError("parts of chords that are counted in the broker, and nobody to join them")
        self.chord_joiner.add(part, self.following, on_done)

    def _requeue_unconfirmed(self, request: Request) -> None:
        """The worker stops before the request's messages are confirmed: its delivery is requeued."""
        logger.warning(
            "Task %s[%s] goes back to %s: its result or its follow-ups could not be published before the worker stopped",
            request.task, request.id, request.queue,
            extra=request.log_fields,
        )  # fmt: skip
        self.deliveries.give_back([request])
        self.wake()

    def _turn(self) -> None:
        """The end of a loop turn with deliveries or outcomes."""
        self._turn_is_due = False
        self.dispatcher.run()
        self.deliveries.flush()
        if not self.is_quiet:
            self.windows.look(self._clock(), self._number)
        else:
            self.lifecycle.shutdown.progress()

    def quiet(self) -> None:
        """Take no more deliveries; requeue the requests that do not run yet."""
        if self.is_quiet:
            return
        self.is_quiet = True
        self.lost.stop()
        self.steps.look(is_quiet=True)
        self.consumer.pause()
        acks_early = self.deliveries.acks_early
        # What was acked early runs, and so does the next step of a chain that has begun.
        unbegun = self.dispatcher.take_unbegun(lambda request: not request.first and request.number not in acks_early)
        self.deliveries.give_back(unbegun + self.dispatcher.clear() + self.intake.clear())
        self.deliveries.flush()
        self.wake()

    def abandon(self) -> None:
        """End running requests now, and requeue them."""
        unfinished = self.dispatcher.stop()
        for request in unfinished:
            self.report.cancelled(request, is_lost=request.number in self.deliveries.acks_early)
        self.deliveries.give_back(unfinished + self.deliveries.redeliveries.give_up())
        self.deliveries.flush()

    # -- the consumer's events

    def on_consuming(self, epoch: int) -> None:
        self.deliveries.begin(epoch)
        if self._has_left_host:
            self._has_left_host = False
            for follow in self.followers:
                follow(self.consumer.host, "the worker's deliveries come from another host")
        names = dict.fromkeys(base_of(queue.name) for queue in self.consumed)
        logger.info("worker: consuming from %s", ", ".join(names) or "no queue")
        self.report.consuming(epoch)
        self.lifecycle.note_consuming()

    def on_connection_lost(self, error: Exception) -> None:
        if held_too_long(error):
            logger.warning(
                "consumer: a task ran for longer than RabbitMQ's consumer_timeout, so the broker takes its message "
                "back; it is answered when it comes again. Raise consumer_timeout for tasks of that length."
            )
        # What comes from the next host may belong to queues of which the old one knows nothing.
        self._has_left_host = self._has_left_host or isinstance(error, HostLeft)
        self.intake.connection_lost(is_silent=isinstance(error, TimeoutError))
        event = "Connection to broker lost" if self.lifecycle.is_ready else "Cannot connect to the broker"
        logger.warning("consumer: %s. Trying to re-establish the connection... (%s)", event, error)
        self.deliveries.look_at_channel()
        self.windows.connection_lost(self._clock())

    def _unanswered(self) -> tuple[list[Request], list[Request]]:
        """The channel is lost: the requests that run on, and those that had not begun, which are dropped."""
        alive = [*self.dispatcher.running_calls(), *self.finisher.confirming.values()]
        return alive, self.dispatcher.clear() + self.intake.clear()

    def on_cancelled(self, queue: str, reason: str) -> None:
        logger.warning("consumer: the broker cancelled the consumer of queue %s: %s", queue, reason)

    def on_fatal(self, error: Exception) -> None:
        self.lifecycle.shutdown.fail(error)

    def unanswered(self, queue: str) -> int:
        return self.deliveries.outstanding_of(queue)

    def on_warning(self, text: str) -> None:
        logger.warning("%s", text)

    def add_queue(self, queue: Queue, dead_letter: Queue | None) -> None:
        """Note a queue and its dead-letter queue, before its first delivery."""
        self.work_queues[queue.name] = WorkQueue(queue, dead_letter)
        self.division.consumes(queue.name)
        if self.division:
            self.dispatcher.divide(self.division)

    def divide(self, queue: str, slots: QueueSlots) -> None:
        """Give a queue slots of its own, or others than it had. Raises: ConfigurationError (so many cannot be kept free)."""
        self.division.give(queue, slots)
        self.dispatcher.divide(self.division)
        self.windows.resize()
        self.wake()
