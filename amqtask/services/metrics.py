"""Metrics for Prometheus, counted in the worker's main process, where every task of every pool begins and ends.

Nothing is counted in children, so there is no directory of files that several processes share, and no child's counts are lost
with it. Counting is adding to plain numbers on the I/O loop; prometheus_client (extra `metrics`) formats them on request. Task
names that this worker does not know share the label `unknown`: anybody may send any name.
"""

from __future__ import annotations

import platform
import re
import socket
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from http import HTTPStatus
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from amqtask.exceptions import ConfigurationError, PublishRefused, Unroutable
from amqtask.flow.contract import CLOSED, HALF_OPEN, OPEN
from amqtask.ground import VERSION
from amqtask.ground.accepting import Acceptor
from amqtask.ground.printable import bounded_logger, clause
from amqtask.protocol.task import PUBLISHED_AT, timestamp
from amqtask.worker.report import Observer

if TYPE_CHECKING:
    from types import ModuleType

    from amqtask.client.flow_store import LimitState
    from amqtask.exceptions import PublishError
    from amqtask.execution.request import Outcome, Request
    from amqtask.pool import Loop, Timer
    from amqtask.protocol.message import Message
    from amqtask.transport.contract import LoopPublisher
    from amqtask.worker.worker import Worker


# -- A small HTTP/1.1 server on the worker's I/O loop, for monitors: metrics and health.
#
# On the loop, not in a thread, for three reasons: the data are read where they change, without locks; it is the same under
# eventlet and gevent, where threads are green; and a worker whose loop stands still does not answer, as it should. One
# request per connection, GET and HEAD only. A client that is slow or sends much is cut off, and when the most connections are
# open, the oldest one is closed for a new one.

logger = bounded_logger("amqtask.worker")

TEXT = "text/plain; charset=utf-8"
MOST_HEAD_BYTES = 16_384
MOST_CONNECTIONS = 64
PATIENCE_SECONDS = 5.0


class Reply(NamedTuple):
    """The reply of a page."""

    status: int
    body: bytes
    content_type: str = TEXT


# Called with the request's headers (lower-case names).
Page = Callable[[Mapping[str, str]], Reply]


def text(status: int, line: str) -> Reply:
    """A reply with one line of text."""
    return Reply(status, f"{line}\n".encode())


def respond(head: bytes, pages: Mapping[str, Page]) -> bytes:
    """The complete response to a request's head (all up to the empty line)."""
    lines = head.decode("latin-1").split("\r\n")
    method, _, target_and_version = lines[0].partition(" ")
    target, _, version = target_and_version.partition(" ")
    if not version.startswith("HTTP/1."):
        return _response(text(400, "this is an HTTP/1.1 server"))
    if method not in ("GET", "HEAD"):
        return _response(text(405, "only GET and HEAD"), "Allow: GET, HEAD\r\n")
    page = pages.get(target.partition("?")[0])
    paths = ", ".join(sorted(pages))
    reply = text(404, f"there are: {paths}") if page is None else _turn_to(page, _headers(lines[1:]))
    return _response(reply, with_body=method == "GET")


def _headers(lines: list[str]) -> dict[str, str]:
    pairs = (line.partition(":") for line in lines if line)
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


def _turn_to(page: Page, headers: Mapping[str, str]) -> Reply:
    try:
        return page(headers)
    except Exception as error:  # a monitor must not end the worker
        logger.exception("a page for monitors failed")
        return text(500, repr(error))


def _response(reply: Reply, extra_headers: str = "", *, with_body: bool = True) -> bytes:
    head = (
        f"HTTP/1.1 {reply.status} {HTTPStatus(reply.status).phrase}\r\nContent-Type: {reply.content_type}\r\n"
        f"Content-Length: {len(reply.body)}\r\nCache-Control: no-store\r\nConnection: close\r\n{extra_headers}\r\n"
    )
    return head.encode("latin-1") + (reply.body if with_body else b"")


class HttpServer:
    """Serves `pages` (path → page) on one port. With `port` 0 it takes a free one, which `port` then is."""

    name = "http"

    def __init__(self, loop: Loop, *, host: str, port: int, pages: Mapping[str, Page]) -> None:
        self._loop = loop
        self._host = host
        self.port = port
        self.pages = pages
        self._acceptor: Acceptor | None = None
        self._open: dict[int, _Connection] = {}

    def start(self) -> None:
        """Listen. Raises: ConfigurationError (the port is taken, or forbidden)."""
        if self._acceptor is not None:
            return
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        try:
            listener = socket.create_server((self._host, self.port), family=family, backlog=MOST_CONNECTIONS)
        except OSError as error:
            raise ConfigurationError(
                f"cannot listen on {self._host} port {self.port} for metrics or health: {clause(error.strerror or error)}. "
                "Give each worker of a host a port of its own."
            ) from error
        self.port = listener.getsockname()[1]
        self._acceptor = Acceptor(self._loop, listener, self._accepted, make_room=self._make_room)
        self._acceptor.start()

    def stop(self) -> None:
        if self._acceptor is not None:
            self._acceptor.stop()
            self._acceptor = None
        for connection in list(self._open.values()):
            connection.close()

    def _accepted(self, accepted: socket.socket) -> None:
        if len(self._open) >= MOST_CONNECTIONS:
            self._make_room()
        self._open[accepted.fileno()] = _Connection(self._loop, accepted, self.pages, self._forget)

    def _make_room(self) -> bool:
        """Close the oldest connection: a probe takes a moment only."""
        oldest = next(iter(self._open.values()), None)
        if oldest is not None:
            oldest.close()
        return oldest is not None

    def _forget(self, fd: int) -> None:
        self._open.pop(fd, None)


class _Connection:
    """One request and its response."""

    def __init__(
        self, loop: Loop, sock: socket.socket, pages: Mapping[str, Page], on_closed: Callable[[int], None]
    ) -> None:
        self._loop = loop
        self._socket = sock
        self._fd = sock.fileno()
        self._pages = pages
        self._on_closed = on_closed
        self._head = b""
        self._unsent = memoryview(b"")
        self._timer: Timer | None = loop.call_later(PATIENCE_SECONDS, self.close)
        loop.add_reader(self._fd, self._read)

    def _read(self) -> None:
        try:
            piece = self._socket.recv(MOST_HEAD_BYTES)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        if not piece:
            self.close()
            return
        self._head += piece
        head, end, _ = self._head.partition(b"\r\n\r\n")
        if end:
            self._answer(respond(head, self._pages))
        elif len(self._head) > MOST_HEAD_BYTES:
            self._answer(_response(text(431, "too many headers")))

    def _answer(self, response: bytes) -> None:
        self._loop.remove_reader(self._fd)
        self._unsent = memoryview(response)
        self._loop.add_writer(self._fd, self._write)

    def _write(self) -> None:
        try:
            sent = self._socket.send(self._unsent)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        self._unsent = self._unsent[sent:]
        if not self._unsent:
            self.close()

    def close(self) -> None:
        """Close the connection; may be called twice."""
        if self._timer is None:
            return
        self._timer.cancel()
        self._timer = None
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        try:
            # A child that was forked meanwhile has the socket, too: a mere close would not end the connection.
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # the client has closed its end
            pass
        self._socket.close()
        self._on_closed(self._fd)


UNKNOWN = "unknown"
# Finds a version in an Accept header that is not like 1.0.0.
_no_version = re.compile(r"version=(?!\d{1,4}(\.\d{1,4}){0,3}\s*(;|,|$))").search
# Upper bounds in seconds: from a cache look-up to an hour's report.
BUCKETS = (0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)


class Durations:
    """A histogram: how many durations were up to each bound."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.total += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """Each upper bound and how many are up to it, as Prometheus needs them."""
        bounds = [*map(str, BUCKETS), "+Inf"]
        return list(zip(bounds, accumulate(self.counts), strict=True))


class TaskNumbers:
    """The counts of one task on one queue."""

    __slots__ = ("dead", "received", "runtime", "states", "wait")

    def __init__(self) -> None:
        self.received = 0
        self.dead = 0
        self.states: Counter[str] = Counter()
        self.runtime = Durations()
        self.wait = Durations()


class CountedPublisher:
    """A LoopPublisher that counts how its publishes end, in `outcomes`."""

    def __init__(self, publisher: LoopPublisher) -> None:
        self._publisher = publisher
        self.outcomes: Counter[str] = Counter({"confirmed": 0, "returned": 0, "refused": 0, "failed": 0})

    @property
    def outstanding(self) -> int:
        """See LoopPublisher."""
        return self._publisher.outstanding

    @property
    def host(self) -> str:
        """As of the wrapped one."""
        return self._publisher.host

    def go_to(self, host: str, reason: str) -> None:
        """See LoopPublisher."""
        self._publisher.go_to(host, reason)

    @property
    def oldest(self) -> Message | None:
        """See LoopPublisher."""
        return self._publisher.oldest

    def start(self) -> None:
        self._publisher.start()

    def stop(self) -> None:
        self._publisher.stop()

    def publish(self, message: Message, on_done: Callable[[PublishError | None], None]) -> None:
        """See LoopPublisher."""

        def done(error: PublishError | None) -> None:
            self.outcomes[_ending(error)] += 1
            on_done(error)

        self._publisher.publish(message, done)


def _ending(error: PublishError | None) -> str:
    if error is None:
        return "confirmed"
    if isinstance(error, Unroutable):
        return "returned"
    return "refused" if isinstance(error, PublishRefused) else "failed"


# By the number that a metric has for them.
BREAKER_STATES = (CLOSED, HALF_OPEN, OPEN)


class Metrics(Observer):
    """Counts from `start` on; Prometheus reads `page`. `breakers` has the state of each task's breaker.

    Raises: ConfigurationError, when prometheus_client is not installed.
    """

    name = "metrics"

    def __init__(
        self,
        worker: Worker,
        publisher: CountedPublisher,
        *,
        limits: Callable[[], Iterable[LimitState]] = tuple,
        breakers: Callable[[], Mapping[str, str]] = dict,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._exposition = _prometheus_exposition()
        self._worker = worker
        self._publisher = publisher
        self._limits = limits
        self._breakers = breakers
        self._wall_clock = wall_clock
        self._tasks: dict[tuple[str, str], TaskNumbers] = {}
        self._redeliveries: Counter[str] = Counter()
        self._reconnects = 0
        self._epoch: int | None = None

    @property
    def pages(self) -> dict[str, Page]:
        return {"/metrics": self.page}

    def start(self) -> None:
        self._worker.observe(self)

    def stop(self) -> None:
        self._worker.unobserve(self)

    def page(self, headers: Mapping[str, str]) -> Reply:
        """The page in the text format, or as OpenMetrics if the request accepts that."""
        accept = headers.get("accept", "")
        # The library expects that the requested version is a number, and copies it into its answer.
        encode, content_type = self._exposition.choose_encoder("" if _no_version(accept) else accept)
        return Reply(200, encode(self), content_type)

    # -- counting

    def _numbers(self, request: Request) -> TaskNumbers:
        key = (request.task, request.queue)
        numbers = self._tasks.get(key)
        if numbers is not None:
            return numbers
        if request.task not in self._worker.strategies:
            key = (UNKNOWN, request.queue)
        return self._tasks.setdefault(key, TaskNumbers())

    def on_received(self, request: Request) -> None:
        self._numbers(request).received += 1
        if request.redelivered:
            self._redeliveries[request.queue] += 1

    def on_started(self, request: Request) -> None:
        """Count the wait: of messages with their time of publishing, for their first delivery only."""
        published = request.headers.get(PUBLISHED_AT)
        if published.__class__ is not int or request.redelivered:
            return
        since = published / 1000
        eta = request.headers.get("eta")
        if eta:
            since = max(since, timestamp(eta))  # it could not run before
        self._numbers(request).wait.add(max(0.0, self._wall_clock() - since))

    def on_ended(self, request: Request, outcome: Outcome) -> None:
        numbers = self._numbers(request)
        numbers.states[outcome.state] += 1
        if outcome.runtime > 0:
            numbers.runtime.add(outcome.runtime)

    def on_dead_lettered(self, request: Request) -> None:
        self._numbers(request).dead += 1

    def on_consuming(self, epoch: int) -> None:
        if self._epoch not in (None, epoch):
            self._reconnects += 1
        self._epoch = epoch

    # -- output

    def collect(self) -> Iterator[Any]:
        """prometheus_client's Collector: every metric with its samples."""
        from prometheus_client import core

        yield from self._of_tasks(core)
        yield from self._of_the_worker(core)
        limits, labels = list(self._limits()), ["task", "limit"]
        yield _filled(
            core.GaugeMetricFamily("amqtask_limit_running", "Runs within a limit, on all workers.", labels=labels),
            (((limit.task, limit.limit), limit.running) for limit in limits),
        )
        yield _filled(
            core.GaugeMetricFamily("amqtask_limit_waiting", "About how many runs wait for a limit.", labels=labels),
            (((limit.task, limit.limit), limit.waiting) for limit in limits),
        )

    def _of_tasks(self, core: ModuleType) -> Iterator[Any]:
        tasks = sorted(self._tasks.items())
        labels = ["task", "queue"]
        yield _filled(
            core.CounterMetricFamily("amqtask_tasks", "Tasks that ended, by state.", labels=["task", "queue", "state"]),
            (((*key, state), count) for key, numbers in tasks for state, count in sorted(numbers.states.items())),
        )
        yield _filled(
            core.CounterMetricFamily("amqtask_tasks_received", "Task messages received.", labels=labels),
            ((key, numbers.received) for key, numbers in tasks),
        )
        yield _filled(
            core.CounterMetricFamily("amqtask_dead_letters", "Messages moved to a dead-letter queue.", labels=labels),
            ((key, numbers.dead) for key, numbers in tasks if numbers.dead),
        )
        runtime = core.HistogramMetricFamily(
            "amqtask_task_runtime_seconds", "How long tasks ran, however they ended.", labels=labels
        )
        wait = core.HistogramMetricFamily(
            "amqtask_task_queue_wait_seconds",
            "From publish (or eta) to start; of messages with a timestamp_in_ms header (task_send_timestamp).",
            labels=labels,
        )
        for key, numbers in tasks:
            for family, durations in ((runtime, numbers.runtime), (wait, numbers.wait)):
                if any(durations.counts):
                    family.add_metric(key, buckets=durations.buckets(), sum_value=durations.total)
        yield runtime
        yield wait

    def _of_the_worker(self, core: ModuleType) -> Iterator[Any]:
        worker, counter, gauge = self._worker, core.CounterMetricFamily, core.GaugeMetricFamily
        pools, running = worker.pool.members, len(worker.dispatcher.running)
        has_one = len(pools) == 1
        slots = gauge("amqtask_pool_slots", "Slots of the pool.", labels=["state"] if has_one else ["state", "pool"])
        busy = 0
        for pool in pools:
            busy_here = min(pool.slots, running if has_one else worker.division.running_in(pool))
            busy += busy_here
            for state, number in (("busy", busy_here), ("idle", pool.slots - busy_here)):
                slots.add_metric((state,) if has_one else (state, pool.name), number)
        yield slots
        yield _filled(
            gauge("amqtask_tasks_waiting", "Tasks that this worker holds and that do not run yet."),
            [((), worker.dispatcher.waiting + running - busy)],
        )
        yield _filled(
            gauge("amqtask_prefetch_window", "Unanswered deliveries that are asked for.", labels=["queue"]),
            (((queue,), window.current) for queue, window in worker.windows.by_queue.items()),
        )
        yield _filled(
            counter("amqtask_redeliveries", "Messages that came for another time.", labels=["queue"]),
            (((queue,), count) for queue, count in self._redeliveries.items()),
        )
        yield _filled(counter("amqtask_reconnects", "How often consuming began again."), [((), self._reconnects)])
        yield _filled(
            counter(
                "amqtask_publish_confirms",
                "How the worker's publishes ended (results, retries, next steps, dead letters).",
                labels=["outcome"],
            ),
            (((outcome,), count) for outcome, count in self._publisher.outcomes.items()),
        )
        yield _filled(
            gauge("amqtask_publish_unconfirmed", "The worker's publishes that wait for their confirm."),
            [((), self._publisher.outstanding)],
        )
        yield _filled(
            gauge("amqtask_breaker_state", "Of a task's breaker: 0 closed, 1 half-open, 2 open.", labels=["task"]),
            (((task,), BREAKER_STATES.index(state)) for task, state in sorted(self._breakers().items())),
        )
        yield _filled(
            gauge("amqtask_build_info", "Always 1.", labels=["version", "python", "pool", "hostname"]),
            [((VERSION, platform.python_version(), worker.pool.name, worker.setup.hostname), 1)],
        )


def _filled(family: Any, samples: Iterable[tuple[Iterable[str], float]]) -> Any:
    for labels, value in samples:
        family.add_metric(labels, value)
    return family


def _prometheus_exposition() -> Any:
    """prometheus_client's formatters, which work on any object with `collect`; its process-wide registry is not used."""
    try:
        import prometheus_client.exposition
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            '--metrics-port needs prometheus_client, which is not installed: pip install "amqtask[metrics]"'
        ) from error
    return prometheus_client.exposition
