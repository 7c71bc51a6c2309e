"""Signals under Celery's names. One that nobody is connected to is falsy, so that callers can skip it."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

from amqtask.ground.plugins import WithListedNames
from amqtask.ground.printable import bounded_logger, count

logger = bounded_logger("amqtask.signals")
F = TypeVar("F", bound=Callable[..., Any])

if TYPE_CHECKING:
    # Called with sender=, signal= and the arguments of its signal; what it returns is told to who sends.
    Receiver = Callable[..., Any]
# Seconds between the attempts of a receiver that is connected with `retry`: the first pause, and the longest.
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 30.0


class Signal(WithListedNames, others_names="providing_args receivers send_robust"):
    """`connect` as a decorator or call, with or without a `sender`; receivers are held weakly unless `weak=False`.

    A receiver that raises is logged and does not stop the others, nor the sender.
    """

    def __init__(self, name: str, arguments: tuple[str, ...] = ()) -> None:
        self.name = name
        self.arguments = arguments
        # Empty while nobody is connected; where each task asks, it is looked at directly.
        self.connected: dict[object, tuple[object, Callable[[], Receiver | None]]] = {}

    def __bool__(self) -> bool:
        return bool(self.connected)

    def __repr__(self) -> str:
        return f"<Signal {self.name}: {count(len(self.connected), 'receiver')}>"

    def connect(
        self,
        receiver: F | None = None,
        sender: object = None,
        weak: bool = True,
        dispatch_uid: object = None,
        retry: bool = False,
        **_: object,
    ) -> Any:
        """Call `receiver(sender=…, signal=…, **arguments)` for each send (of that sender); returns the receiver.

        With `retry` a receiver that raises is called again, after 2 s, 4 s … 30 s, until it does not: who sends waits for it.
        """
        if receiver is None:
            return lambda function: self.connect(function, sender, weak, dispatch_uid, retry)
        key = (dispatch_uid if dispatch_uid is not None else _identity(receiver), _sender_key(sender))
        called = _until_it_ends_well(receiver, self.name) if retry else receiver
        reference = self._reference(receiver, key) if weak and not retry else lambda: called
        self.connected[key] = (_sender_key(sender), reference)
        return receiver

    def disconnect(
        self, receiver: Receiver | None = None, sender: object = None, dispatch_uid: object = None, **_: object
    ) -> bool:
        """Undo `connect`; whether it was connected."""
        identity = dispatch_uid if dispatch_uid is not None else _identity(receiver)
        return self.connected.pop((identity, _sender_key(sender)), None) is not None

    def send(self, sender: object = None, **arguments: object) -> list[tuple[Receiver, Any]]:
        """Call the receivers; what each returned (or the exception it raised)."""
        answers: list[tuple[Receiver, Any]] = []
        if not self.connected:
            return answers
        sender_key = _sender_key(sender)
        for filtered, reference in list(self.connected.values()):
            receiver = reference()
            if receiver is None or (filtered is not None and filtered != sender_key):
                continue
            try:
                answers.append((receiver, receiver(signal=self, sender=sender, **arguments)))
            except Exception as error:
                logger.exception("receiver %r of signal %s failed", receiver, self.name)
                answers.append((receiver, error))
        return answers

    def has_listeners(self, sender: object = None) -> bool:
        """Whether a send by `sender` would reach anybody."""
        sender_key = _sender_key(sender)
        return any(filtered is None or filtered == sender_key for filtered, _ in self.connected.values())

    def _reference(self, receiver: Receiver, key: object) -> Callable[[], Receiver | None]:
        def gone(_: object) -> None:
            self.connected.pop(key, None)

        if hasattr(receiver, "__self__") and hasattr(receiver, "__func__"):
            return weakref.WeakMethod(receiver, gone)
        return weakref.ref(receiver, gone)


def _until_it_ends_well(receiver: Receiver, signal: str) -> Receiver:
    @wraps(receiver)
    def called(**arguments: object) -> object:
        pause = FIRST_PAUSE
        while True:
            try:
                return receiver(**arguments)
            except Exception:
                logger.exception("receiver %r of signal %s failed; it is called again in %g s", receiver, signal, pause)
            time.sleep(pause)
            pause = min(pause + FIRST_PAUSE, LONGEST_PAUSE)

    return called


def _identity(receiver: Any) -> object:
    if hasattr(receiver, "__self__") and hasattr(receiver, "__func__"):
        return id(receiver.__self__), id(receiver.__func__)
    return id(receiver)


def _sender_key(sender: object) -> object:
    """Strings are equal by value (task names, node names); a task stands for its name; others for themselves."""
    if sender is None or isinstance(sender, str):
        return sender
    name = getattr(sender, "name", None)
    return name if isinstance(name, str) else id(sender)


# -- publishing, in the caller's process
before_task_publish = Signal(
    "before_task_publish",
    # `follow_up` and `size` are ours: whether it is a retry, callback or next step, made where a task runs (the worker publishes
    # it later), and the bytes of the body.
    ("body", "exchange", "routing_key", "headers", "properties", "declare", "retry_policy", "follow_up", "size"),
)
after_task_publish = Signal("after_task_publish", ("body", "exchange", "routing_key", "headers"))
# Ours: what before_task_publish announced is not stored by the broker.
task_publish_failed = Signal("task_publish_failed", ("exception", "body", "exchange", "routing_key", "headers"))

# -- a task's life, in the slot that runs it
task_prerun = Signal("task_prerun", ("task_id", "task", "args", "kwargs"))
task_postrun = Signal("task_postrun", ("task_id", "task", "args", "kwargs", "retval", "state"))
task_success = Signal("task_success", ("result", "runtime"))
task_retry = Signal("task_retry", ("request", "reason", "einfo"))
task_failure = Signal("task_failure", ("task_id", "exception", "args", "kwargs", "traceback", "einfo"))
task_internal_error = Signal(
    "task_internal_error", ("task_id", "args", "kwargs", "request", "exception", "traceback", "einfo")
)

# -- deliveries, in the worker's main process
task_received = Signal("task_received", ("request",))
task_revoked = Signal("task_revoked", ("request", "terminated", "signum", "expired"))
task_rejected = Signal("task_rejected", ("message", "exc"))
task_unknown = Signal("task_unknown", ("message", "exc", "name", "id"))

# -- the worker
import_modules = Signal("import_modules")
celeryd_init = Signal("celeryd_init", ("instance", "conf", "options"))
celeryd_after_setup = Signal("celeryd_after_setup", ("instance", "conf"))
worker_init = Signal("worker_init")
worker_before_create_process = Signal("worker_before_create_process")
worker_process_init = Signal("worker_process_init")
worker_process_shutdown = Signal("worker_process_shutdown", ("pid", "exitcode"))
worker_ready = Signal("worker_ready")
worker_shutting_down = Signal("worker_shutting_down", ("sig", "how", "exitcode"))
worker_shutdown = Signal("worker_shutdown")
heartbeat_sent = Signal("heartbeat_sent")

# -- beat; the sender is the service
beat_init = Signal("beat_init")
beat_embedded_init = Signal("beat_embedded_init")

# -- the command line; the sender is the command
user_preload_options = Signal("user_preload_options", ("app", "options"))

# -- logging
setup_logging = Signal("setup_logging", ("loglevel", "logfile", "format", "colorize"))
after_setup_logger = Signal("after_setup_logger", ("logger", "loglevel", "logfile", "format", "colorize"))
after_setup_task_logger = Signal("after_setup_task_logger", ("logger", "loglevel", "logfile", "format", "colorize"))
