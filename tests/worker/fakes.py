"""A pool whose slots end when the test says so, and a loop whose clock the test turns: both keep their contracts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from amqtask import states
from amqtask.exceptions import PublishError
from amqtask.execution.request import Outcome, Request
from amqtask.pool import PoolDefaults, Running
from amqtask.protocol.entities import Declaration, Queue
from amqtask.protocol.message import Delivery, Message
from amqtask_pools.several import SeveralPools


class HandTimer:
    def __init__(self, at: float, callback: Callable[[], None]) -> None:
        self.at = at
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class HandLoop:
    """`advance(seconds)` runs what is due; nothing happens by itself."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.stopped = False
        self._soon: list[Callable[[], None]] = []
        self._timers: list[HandTimer] = []

    def call_later(self, delay: float, callback: Callable[[], None]) -> HandTimer:
        timer = HandTimer(self.now + delay, callback)
        self._timers.append(timer)
        return timer

    def call_soon(self, callback: Callable[[], None]) -> None:
        self._soon.append(callback)

    def call_soon_threadsafe(self, callback: Callable[[], None]) -> None:
        self._soon.append(callback)

    def add_reader(self, fd: int, callback: Callable[[], None]) -> None:
        raise NotImplementedError

    remove_reader = remove_writer = lambda self, fd: None
    add_writer = add_reader

    def service(self) -> None:
        self.turn()

    def run(self) -> None:
        self.turn()

    def stop(self) -> None:
        self.stopped = True

    def close(self) -> None: ...

    def turn(self) -> None:
        """Run what was called soon, and what that calls soon."""
        while self._soon:
            due, self._soon = self._soon, []
            for callback in due:
                callback()

    def advance(self, seconds: float) -> None:
        self.turn()
        end = self.now + seconds
        while due := [timer for timer in self._timers if timer.at <= end and not timer.cancelled]:
            timer = min(due, key=lambda each: each.at)
            self._timers.remove(timer)
            self.now = max(self.now, timer.at)
            timer.callback()
            self.turn()
        self.now = end


class HandPool(PoolDefaults):
    """`end(number)` ends a request; with `inline` it ends inside `submit`, as in the solo pool."""

    name: ClassVar[str] = "hand"
    limits: ClassVar[frozenset[str]] = frozenset()
    can_restart = False

    def __init__(self, slots: int = 1, *, inline: bool = False) -> None:
        self.slots = slots
        self.inline = inline
        self.running: dict[int, Request] = {}
        self.started: list[Request] = []
        # Numbers of those in `running` that have not begun.
        self.unbegun: list[int] = []
        self.can_terminate = False
        self.restarts = 0
        self.signals: list[int | None] = []
        self.on_outcomes: Callable[[list[Outcome]], None] = lambda outcomes: None

    @classmethod
    def prepare_process(cls) -> None: ...

    def start(self) -> None: ...

    @property
    def free(self) -> int:
        return self.slots - len(self.running)

    def submit(self, request: Request) -> None:
        assert self.free > 0, "submitted while no slot is free"
        self.running[request.number] = request
        self.started.append(request)
        if self.inline:
            self.end(request.number)

    def end(self, number: int, **fields: Any) -> None:
        del self.running[number]
        self.on_outcomes([Outcome(number=number, **fields)])

    def resize(self, slots: int) -> None:
        self.slots = slots

    def restart(self) -> None:
        self.restarts += 1

    def take_back(self) -> list[Request]:
        taken = [self.running.pop(number) for number in self.unbegun if number in self.running]
        self.unbegun.clear()
        return taken

    def cancel(self, number: int, reason: str) -> None:
        """It has no coroutines."""

    def terminate(self, number: int, reason: str, signum: int | None = None) -> bool:
        if self.can_terminate and number in self.running:
            self.signals.append(signum)
            self.end(number, state=states.REVOKED, reason=reason)
            return True
        return False

    def find(self, number: int) -> Running | None:
        return Running(4711) if number in self.running else None

    def stop(self) -> list[Request]:
        unfinished = list(self.running.values())
        self.running.clear()
        return unfinished

    def stats(self) -> dict[str, Any]:
        return {}


class OtherPool(HandPool):
    name: ClassVar[str] = "other"


class TwoHandPools(SeveralPools):
    """A pool for the queue `q` and all others, and one for the queue `web`."""

    name: ClassVar[str] = "hand+other"
    limits: ClassVar[frozenset[str]] = frozenset({"soft"})

    def __init__(self, first: int, second: int) -> None:
        self.hand, self.other = HandPool(first), OtherPool(second)
        self._members: Any = (self.hand, self.other)
        self._first: Any = self.hand
        self._of_queue: Any = {"web": self.other}
        self._told = set()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "on_outcomes":  # as the bench sets it
            self.hand.on_outcomes = self.other.on_outcomes = value
        else:
            super().__setattr__(name, value)

    @property
    def running(self) -> dict[int, Any]:
        return {**self.hand.running, **self.other.running}

    def end(self, number: int, **fields: Any) -> None:
        (self.hand if number in self.hand.running else self.other).end(number, **fields)


class ToldConsumer:
    """A consumer that writes down the frames it is told to send."""

    def __init__(self) -> None:
        self.frames: list[tuple[Any, ...]] = []
        self.windows: dict[str, int] = {}
        self.words: list[str] = []
        self.epoch = 1
        self.is_consuming = True
        # Whether it acknowledges and publishes in one step, and what it was told to.
        self.replaces = False
        self.replaced: list[tuple[Delivery, Sequence[Message], Callable[[bool], None]]] = []

    def start(self) -> None:
        self.words.append("start")

    def add_queue(
        self,
        queue: Queue,
        *,
        prefetch: int,
        dead_letter: Queue | None = None,
        declare: tuple[Declaration, ...] | None = None,
    ) -> None:
        self.windows[queue.name] = prefetch

    def go_to(self, host: str, reason: str) -> None:
        self.words.append(f"go to {host}")

    def cancel_queue(self, name: str) -> None:
        self.words.append(f"cancel {name}")

    def set_prefetch(self, queue: str, prefetch: int) -> None:
        self.windows[queue] = prefetch

    def ack(self, tag: int, *, multiple: bool = False) -> None:
        self.frames.append(("ack", tag, multiple))

    def reject(self, tag: int, *, requeue: bool) -> None:
        self.frames.append(("reject", tag, requeue))

    def nack(self, tag: int, *, requeue: bool = True) -> None:
        self.frames.append(("nack", tag, requeue))

    def replace(self, delivery: Delivery, messages: Sequence[Message], on_done: Callable[[bool], None]) -> bool:
        if self.replaces:
            self.replaced.append((delivery, messages, on_done))
        return self.replaces

    def pause(self) -> None:
        self.words.append("pause")

    def resume(self) -> None:
        self.words.append("resume")

    @property
    def host(self) -> str:
        return "amqp://one"

    def leave(self, reason: str) -> None:
        self.words.append("leave")

    def stop(self, *, on_stopped: Callable[[], None] | None = None) -> None:
        self.words.append("stop")
        if on_stopped is not None:
            on_stopped()


class HandPublisher:
    """A loop publisher whose confirms come when the test says so."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.went_to: list[str] = []
        self._pending: list[tuple[Message, Callable[[PublishError | None], None]]] = []

    def publish(self, message: Message, on_done: Callable[[PublishError | None], None]) -> None:
        self.sent.append(message)
        self._pending.append((message, on_done))

    def confirm(self, error: PublishError | None = None, *, which: int = 0) -> None:
        """Confirm (or refuse) the oldest message, or another one."""
        self._pending.pop(which)[1](error)

    def confirm_all(self) -> None:
        while self._pending:
            self.confirm()

    @property
    def outstanding(self) -> int:
        return len(self._pending)

    @property
    def host(self) -> str:
        return "amqp://one"

    def go_to(self, host: str, reason: str) -> None:
        self.went_to.append(host)

    @property
    def oldest(self) -> Message | None:
        return self._pending[0][0] if self._pending else None

    def start(self) -> None: ...

    def stop(self) -> None: ...
