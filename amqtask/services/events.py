"""The event sender: sends monitors (Flower, `amqtask events`) the events of tasks, and that the worker is alive.

Celery's rules (celery/worker/heartbeat.py, celery/worker/consumer/events.py): worker-online, -heartbeat and -offline are
sent unless the worker was started `--without-heartbeat`; task events with `-E`, or from the moment that a monitor asks
for them. Task events are gathered and go out as lists under `task.multi`, worker events one by one.

Events never hold up tasks. They are transient, and go over another connection than tasks and results. While the broker takes none
(it is away, or blocks publishing) the newest MOST_WAITING are kept: older ones are dropped, which is logged once.
"""

from __future__ import annotations

import os
import platform
import time
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from math import ceil
from typing import TYPE_CHECKING

from amqtask import signals, states
from amqtask.events.dispatcher import message_workflow, sent_fields, workflow_fields
from amqtask.exceptions import EncodeError
from amqtask.execution.request import HELD, Answer
from amqtask.ground import VERSION
from amqtask.ground.loop import Aside, OneTimer, Ticker
from amqtask.ground.printable import bounded_logger
from amqtask.protocol.event import (
    LARGEST_KEPT,
    RERUN_OF,
    EventTexts,
    event_message,
    fields_text,
    json_text,
    texts_message,
    utc_offset,
)
from amqtask.protocol.message import strip_transit_headers
from amqtask.protocol.serialization import signs
from amqtask.worker.report import Observer, name_of

if TYPE_CHECKING:
    from amqtask.events.dispatcher import LamportClock
    from amqtask.exceptions import PublishError
    from amqtask.execution.request import Outcome, Request
    from amqtask.ground.shapes import JsonObject
    from amqtask.protocol.event import Keeping
    from amqtask.protocol.message import Message
    from amqtask.transport.contract import LoopPublisher
    from amqtask.worker.worker import Worker

logger = bounded_logger("amqtask.worker")

# How many events are kept while the broker takes none.
MOST_WAITING = 10_000
# The most events in one message, and the most messages under way at once.
BATCH = 500
WINDOW = 16
# Seconds that an event may wait for others.
GATHER_SECONDS = 0.05
HEARTBEAT_SECONDS = 2.0
# The frequency in a heartbeat on request (celery/worker/control.py).
ASKED_FREQUENCY = 5
SOFTWARE = {"sw_ident": "py-amqtask", "sw_ver": VERSION, "sw_sys": platform.system()}


class EventSender(Observer):
    """Sends the events of one worker.

    `heartbeat` is the seconds between heartbeats, None: no worker events but those on request. With `sent_events` the task
    events include task-sent for messages that the worker itself publishes (retries, next steps). With `keeping` events are kept
    (task_history), and tell more of a task: its queue, its stamps. `on_enabled` is called when
    task events begin (from then on outcomes need a repr of the result).
    """

    name = "events"

    def __init__(
        self,
        worker: Worker,
        *,
        clock: LamportClock,
        make_publisher: Callable[[], LoopPublisher],
        exchange: str,
        serializer: str,
        task_events: bool,
        sent_events: bool = False,
        heartbeat: float | None = HEARTBEAT_SECONDS,
        keeping: Keeping | None = None,
        on_enabled: Callable[[], None] = lambda: None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._worker = worker
        self._clock = clock
        self._make_publisher = make_publisher
        self._exchange = exchange
        self._serializer = serializer
        self._writing = Aside(worker.loop, is_slow=signs(serializer))
        self._starts_enabled = task_events
        self._sent_events = sent_events
        self._heartbeat = heartbeat
        self._keeping = keeping
        self._on_enabled = on_enabled
        self._wall_clock = wall_clock
        self._pid = os.getpid()
        self._hostname = worker.setup.hostname
        self._utcoffset = utc_offset()
        self._texts = EventTexts(self._hostname, pid=self._pid, utcoffset=self._utcoffset)
        self._silent: frozenset[str] = frozenset()
        self._publisher: LoopPublisher | None = None
        self._waiting: deque[str] = deque(maxlen=MOST_WAITING)
        self._on_their_way = 0
        self._timer = OneTimer(worker.loop)
        # The signals with which running requests are being ended, by number.
        self._signums: dict[int, int] = {}
        self._dropped = 0
        self._is_refused = False
        self._beat_is_on_its_way = False
        self._ticker = Ticker(worker.loop, heartbeat or HEARTBEAT_SECONDS, self._beat)
        self._is_stopped = False
        # Whether task events are sent.
        self.is_enabled = False

    # -- the service

    def start(self) -> None:
        if self._starts_enabled:
            self.enable()
        if self._heartbeat is not None:
            self._tell_worker("worker-online", **self._numbers(self._heartbeat))
            self._ticker.start()

    def stop(self) -> None:
        if self._is_stopped:
            return
        self._is_stopped = True
        self._ticker.stop()
        self.disable()
        self._timer.cancel()
        self._hand_over(everything=True)
        self._writing.finish()
        if self._heartbeat is not None and self._publisher is not None:
            self._tell_worker("worker-offline", **self._numbers(self._heartbeat))
        if self._publisher is not None:
            self._publisher.stop()

    # -- remote commands

    def enable(self) -> bool:
        """Send task events from now on. False: they were sent already."""
        if self.is_enabled:
            return False
        self.is_enabled = True
        tasks = self._worker.setup.tasks
        self._silent = frozenset(name for name in tasks if not tasks[name].send_events)
        self._on_enabled()
        self._worker.observe(self)
        return True

    def disable(self) -> bool:
        """Send no more task events. False: none were sent."""
        if not self.is_enabled:
            return False
        self.is_enabled = False
        self._worker.unobserve(self)
        self._signums.clear()
        return True

    def beat_now(self) -> None:
        """Send a heartbeat on request: a monitor that starts asks for the workers that are there."""
        self._tell_worker("worker-heartbeat", freq=ASKED_FREQUENCY, **SOFTWARE)

    # -- what happens to tasks

    def on_received(self, request: Request) -> None:
        get = request.headers.get
        try:
            fields = (
                f'"name": {json_text(name_of(request))}, "args": {json_text(get("argsrepr"))}, '
                f'"kwargs": {json_text(get("kwargsrepr"))}, "root_id": {json_text(get("root_id"))}, '
                f'"parent_id": {json_text(get("parent_id"))}, "retries": {json_text(get("retries") or 0)}, '
                f'"eta": {json_text(get("eta"))}, "expires": {json_text(get("expires"))}, '
            )
        except EncodeError as error:  # headers of a foreign message may have any values
            logger.warning("events: task-received of %s tells nothing of its arguments: %s", request.id, error)
            fields = f'"name": {json_text(request.task)}, '
        if self._keeping is not None:
            fields += kept_fields(request, with_message=self._keeping.arguments)
        self._note("task-received", request.id, request.task, fields)

    def on_started(self, request: Request) -> None:
        self._note("task-started", request.id, request.task, "")

    def on_terminating(self, request: Request, signum: int) -> None:
        self._signums[request.number] = int(signum)

    def on_cancelled(self, request: Request) -> None:
        self._note("task-cancelled", request.id, request.task, "")

    def on_ended(self, request: Request, outcome: Outcome) -> None:
        if self._sent_events and outcome.publish:
            self._note_sent(outcome.publish)  # before the end, so that a retry is not PENDING but RETRY for monitors
        for event_type, fields in _ending(outcome, self._signums.pop(request.number, None)):
            self._note(event_type, request.id, request.task, fields)

    def _note_sent(self, messages: Iterable[Message]) -> None:
        for message in messages:
            if "task" in message.properties.headers:
                fields = sent_fields(message)
                if self._keeping is not None:
                    fields |= message_workflow(message)
                task_id, name = fields.pop("uuid"), fields["name"]
                self._note("task-sent", task_id, name, fields_text(fields))

    def _note(self, event_type: str, task_id: str, task: str, fields: str) -> None:
        if not task_id or task in self._silent:
            return
        text = self._texts.text(event_type, task_id, fields, clock=self._clock.forward(), timestamp=self._wall_clock())
        waiting = self._waiting
        if len(waiting) == MOST_WAITING:
            self._drop_one()
        waiting.append(text)
        if len(waiting) >= BATCH and self._on_their_way < WINDOW:
            self._hand_over()
        elif not self._timer.is_set:
            self._timer.set(GATHER_SECONDS, lambda: self._hand_over(everything=True))

    def _drop_one(self) -> None:
        if not self._dropped:
            logger.warning("events: the broker does not take events now; only the newest %d are kept", MOST_WAITING)
        self._dropped += 1

    # -- to the broker

    def _hand_over(self, *, everything: bool = False) -> None:
        """Publish waiting events in batches, as far as the window allows; only full batches unless `everything`."""
        waiting = self._waiting
        smallest_batch = 1 if everything else BATCH
        while len(waiting) >= smallest_batch and self._on_their_way < WINDOW:
            batch = [waiting.popleft() for _ in range(min(BATCH, len(waiting)))]
            self._on_their_way += 1
            write = partial(texts_message, batch, self._exchange, hostname=self._hostname, serializer=self._serializer)
            self._writing.make(write, partial(self._publish, on_done=self._arrived))

    def _publish(self, message: Message, on_done: Callable[[PublishError | None], None]) -> None:
        """`on_done` is called once for a message and its copy for history."""
        keeping, publisher = self._keeping, self._to_publish()
        if keeping is None:
            publisher.publish(message, on_done)
        elif keeping.copies:
            # First what only live listeners get: the copy's confirm then is the last one.
            publisher.publish(message, _ignore)
            publisher.publish(keeping.copy(message), on_done)
        else:
            message.declare = keeping.declare
            publisher.publish(message, on_done)

    def _arrived(self, error: PublishError | None) -> None:
        self._on_their_way -= 1
        if error is not None and not self._is_refused:
            self._is_refused = True
            logger.warning("events: the broker does not take them: %s", error)
        if error is None and self._dropped and len(self._waiting) < MOST_WAITING:
            logger.warning("events: %d were dropped while the broker did not take any", self._dropped)
            self._dropped = 0
        if self._waiting and not self._timer.is_set:
            self._hand_over(everything=len(self._waiting) < BATCH)

    def _to_publish(self) -> LoopPublisher:
        if self._publisher is None:
            self._publisher = self._make_publisher()
            self._publisher.start()
        return self._publisher

    # -- the worker itself

    def _beat(self) -> None:
        self._look_at_the_time_zone()
        # An old heartbeat is useless: none is sent while the last one is not confirmed.
        if not self._beat_is_on_its_way:
            self._tell_worker("worker-heartbeat", **self._numbers(self._heartbeat or HEARTBEAT_SECONDS))

    def _look_at_the_time_zone(self) -> None:
        offset = utc_offset()
        if offset != self._utcoffset:  # summer begins or ends
            self._utcoffset = offset
            self._texts = EventTexts(self._hostname, pid=self._pid, utcoffset=offset)

    def _numbers(self, frequency: float) -> JsonObject:
        return {
            "freq": frequency,
            "active": len(self._worker.dispatcher.running),
            "processed": self._worker.ended,
            "loadavg": _load_average(),
            **SOFTWARE,
        }

    def _tell_worker(self, event_type: str, **fields: object) -> None:
        if signals.heartbeat_sent:
            signals.heartbeat_sent.send(sender=self)
        event = {
            "type": event_type,
            "clock": self._clock.forward(),
            "timestamp": self._wall_clock(),
            "hostname": self._hostname,
            "utcoffset": self._utcoffset,
            "pid": self._pid,
            **fields,
        }
        self._beat_is_on_its_way = True
        write = partial(event_message, event, self._exchange, serializer=self._serializer)
        is_heartbeat = event_type == "worker-heartbeat"
        # A queue that nobody reads must not fill with heartbeats.
        is_kept = not (is_heartbeat and self._keeping is not None and self._keeping.copies)
        self._writing.make(write, partial(self._publish_beat, is_kept=is_kept))

    def _publish_beat(self, message: Message, *, is_kept: bool) -> None:
        if is_kept:
            self._publish(message, self._beat_arrived)
        else:
            self._to_publish().publish(message, self._beat_arrived)

    def _beat_arrived(self, error: PublishError | None) -> None:
        self._beat_is_on_its_way = False


def kept_fields(request: Request, *, with_message: bool) -> str:
    """What task-received tells for history, as the middle of a JSON object: queue, stamps, the task that it is to stand for, its
    place in a workflow; and the message itself, if that can be written as JSON and is not too large."""
    headers = request.headers
    fields = f'"queue": {json_text(request.queue)}, '
    for name, value in workflow_fields(headers, request.body, request.content_type, request.content_encoding).items():
        fields += _if_writable(name, value)
    for name in (RERUN_OF, "stamps"):
        if headers.get(name):
            fields += _if_writable(name, headers[name])
    if with_message and len(request.body) <= LARGEST_KEPT:
        fields += _if_writable("message", message_document(request))
    return fields


def _if_writable(name: str, value: object) -> str:
    try:
        return fields_text({name: value})
    except EncodeError:
        return ""  # headers of a foreign message may have any values


def message_document(request: Request) -> JsonObject:
    """The message of a request, for `history` to publish it again; the body as text in base64."""
    return {
        "body": b64encode(request.body).decode(),
        "content_type": request.content_type,
        "content_encoding": request.content_encoding,
        "headers": strip_transit_headers(request.headers),
        "exchange": request.exchange,
        "routing_key": request.routing_key,
        "priority": request.priority,
        "correlation_id": request.correlation_id,
        "reply_to": request.reply_to,
    }


def _ignore(error: PublishError | None) -> None:
    """What only live listeners get may be lost."""


def _ending(outcome: Outcome, signum: int | None) -> tuple[tuple[str, str], ...]:
    """The events of an outcome, and their fields."""
    state = outcome.state
    if state == states.SUCCESS:
        # A task that ran when `enable` was called may have no repr of its result.
        result = json_text(outcome.summary or None)
        return (("task-succeeded", f'"result": {result}, "runtime": {outcome.runtime!r}, '),)
    if state == states.RETRY:
        # The cause; the summary says when it runs again.
        cause = outcome.reason or outcome.summary
        return (("task-retried", fields_text({"exception": cause, "traceback": outcome.traceback})),)
    if state == states.REVOKED:
        return (("task-revoked", _revocation(outcome, signum)),)
    if state == HELD:
        return ()
    if outcome.answer is Answer.REQUEUE:
        return (("task-rejected", fields_text({"requeue": True})),)
    if state == states.FAILURE:
        return (("task-failed", _error(outcome)),)
    if state == states.REJECTED:
        # Rejected without requeue: the task's result is a failure, and Celery sends both events.
        return ("task-failed", _error(outcome)), ("task-rejected", fields_text({"requeue": False}))
    return ()  # ignored: the task itself sets its state


def _error(outcome: Outcome) -> str:
    return fields_text({"exception": outcome.summary or outcome.reason, "traceback": outcome.traceback})


def _revocation(outcome: Outcome, signum: int | None) -> str:
    """The fields in Celery's words; the reasons are those of execution/no_run.py, any other reason ended a running task."""
    expired = outcome.reason == "expired"
    terminated = outcome.reason not in ("expired", "revoked")
    return fields_text({"terminated": terminated, "signum": signum if terminated else None, "expired": expired})


def _load_average() -> list[float]:
    return [ceil(load * 100) / 100 for load in os.getloadavg()]
