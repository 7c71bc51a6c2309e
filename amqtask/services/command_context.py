"""What a worker's remote commands work on: their arguments, Control, and PanelState, the first argument of custom commands."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from amqtask.events.dispatcher import LamportClock
from amqtask.exceptions import ConfigurationError
from amqtask.ground.printable import printable
from amqtask.protocol.entities import Exchange
from amqtask.protocol.task import saferepr
from amqtask.topology.declarations import declarations, work_queue
from amqtask.transport.declare import check_declarable

if TYPE_CHECKING:
    from amqtask.ground.shapes import CommandArguments, JsonFields, SettingValues
    from amqtask.protocol.control import Command
    from amqtask.protocol.entities import Queue
    from amqtask.protocol.message import Delivery
    from amqtask.services.autoscale import Autoscale
    from amqtask.services.elections import Elections
    from amqtask.services.events import EventSender
    from amqtask.topology.declarations import QueueDefaults
    from amqtask.topology.delays import Address
    from amqtask.worker.operations import Operations
    from amqtask.worker.worker import Worker


Default = TypeVar("Default", int, None)


def whole(arguments: CommandArguments, name: str, default: Default, most: int = 10_000) -> int | Default:
    """A number among the arguments of a command. Raises: ConfigurationError for what is none, or too much."""
    value = arguments.get(name)
    if value is None:
        return default
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        return whole({name: int(value)}, name, default, most)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise ConfigurationError(f"{name} is a whole number, at most {most}, not {printable(saferepr(value), 50)}")
    return value


OPTIONS = ("durable", "exclusive", "auto_delete", "queue_arguments")
EXCHANGE_TYPES = ("direct", "topic", "fanout", "headers")
_PLACE = ("queue", "exchange", "exchange_type", "routing_key", "slots")


def asked_queue(arguments: CommandArguments, defaults: QueueDefaults) -> Queue | str:
    """The queue by its description; only its name if there is no more in it.

    Options: `durable`, `exclusive`, `auto_delete`, `queue_arguments` (the broker's). Raises: ConfigurationError for
    another option, for an unknown exchange type, and without a name; PublishError for what no broker can have.
    """
    name = arguments.get("queue")
    if not name or not isinstance(name, str):
        raise ConfigurationError("add_consumer needs the name of a queue")
    options = {key: value for key, value in arguments.items() if key not in _PLACE and value is not None}
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise ConfigurationError(f"add_consumer knows no option {', '.join(unknown)} (there are: {', '.join(OPTIONS)})")
    exchange, queue_arguments = arguments.get("exchange"), options.get("queue_arguments")
    if not isinstance(queue_arguments, (Mapping, type(None))):
        raise ConfigurationError("add_consumer wants queue_arguments as a mapping of names")
    queue = work_queue(
        name,
        defaults,
        exchange=_exchange(str(exchange), arguments.get("exchange_type")) if exchange else None,
        routing_key=str(arguments.get("routing_key") or name),
        queue_arguments=queue_arguments,
        durable=bool(options.get("durable", True)),
        exclusive=bool(options.get("exclusive")),
        auto_delete=bool(options.get("auto_delete")),
    )
    for entity in declarations(queue, defaults):
        check_declarable(entity)  # its consumer would try for ever
    return queue if exchange or options else name


def _exchange(name: str, exchange_type: object) -> Exchange:
    exchange_type = exchange_type or "direct"
    if exchange_type not in EXCHANGE_TYPES and not str(exchange_type).startswith("x-"):
        raise ConfigurationError(f"there is no exchange type {exchange_type!r}: it is {', '.join(EXCHANGE_TYPES)}")
    return Exchange(name, type=str(exchange_type))


class Later(NamedTuple):
    """The answer of a command that waits for a server: `ask` is called in a thread, `answer` makes the payload of what it found,
    on the loop."""

    ask: Callable[[], Any]
    answer: Callable[[Any], object]


class Release(Protocol):
    """See amqtask.transport.contract.Delayed."""

    def __call__(self, is_meant: Callable[[Delivery], bool], *, revoked: bool = False) -> int: ...


@dataclass(slots=True, eq=False)
class Control:
    """The worker and its parts, for commands. `settings()` is the app's configuration; `make_queue` makes a queue for
    `add_consumer`, `report()` is the text for a bug report, `accept` has the content types that may be decoded,
    `reload(modules, again)` imports modules and returns the names of tasks that changed; None: the pool must not be restarted.
    """

    worker: Worker
    operations: Operations
    autoscale: Autoscale | None
    settings: Callable[[bool], SettingValues]
    make_queue: Callable[[CommandArguments], tuple[Queue, Queue | None]]
    broker_info: JsonFields
    events: EventSender
    # The worker's one logical clock, which is also in its events.
    lamport: LamportClock = field(default_factory=LamportClock)
    accept: frozenset[str] = frozenset({"application/json"})
    report: Callable[[], str] = str
    reload: Callable[[Iterable[str] | None, bool], set[str]] | None = None
    elections: Elections | None = None
    # Called with each command that the mailbox had, whoever it is for.
    heard: Callable[[Command], None] = lambda command: None
    # Delayed messages that this worker holds until their time, the soonest first.
    delayed: Callable[[int], Sequence[tuple[float, Delivery]]] = lambda limit: ()
    # The shards of a queue that has fair tasks, with their dead-letter queues.
    make_shards: Callable[[Queue], Iterable[tuple[Queue, Queue | None]]] = lambda queue: ()
    # Whether that waits for a server.
    delayed_blocks: bool = False
    # How many of them are to go to an address; deleting those; sending some now.
    count_delayed: Callable[[Address], int] = lambda address: 0
    drop_delayed: Callable[[Address], int] = lambda address: 0
    release_delayed: Release = lambda is_meant, *, revoked=False: 0
    # `state.app` of custom commands.
    app: Any = None
    memory_samples: deque[str] = field(default_factory=lambda: deque(maxlen=1000))

    @property
    def clock(self) -> int:
        """The logical time."""
        return self.lamport.value


class Qos:
    """The prefetch windows; a change applies to the window of each queue, and adaptive windows keep adapting around it."""

    def __init__(self, control: Control) -> None:
        self._windows = control.worker.windows

    @property
    def value(self) -> int:
        """How many deliveries the worker may hold, all queues together."""
        return sum(window.current for window in self._windows.by_queue.values())

    def increment_eventually(self, n: int = 1) -> int:
        """Hold `n` more of each queue; the new `value`."""
        self._windows.shift(n)
        return self.value

    def decrement_eventually(self, n: int = 1) -> int:
        """Hold `n` fewer of each queue, but at least one."""
        return self.increment_eventually(-n)


class ConsumerView:
    """`state.consumer`."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self.app = control.app
        self.hostname = control.worker.setup.hostname
        self.controller = control.worker
        self.qos = Qos(control)

    @property
    def pool(self) -> Any:
        """The worker's pool."""
        return self.controller.pool

    def add_task_queue(
        self,
        queue: str,
        exchange: str | None = None,
        exchange_type: str | None = None,
        routing_key: str | None = None,
        **options: object,
    ) -> None:
        """Consume one more queue; for the options see `asked_queue`."""
        place = {"queue": queue, "exchange": exchange, "exchange_type": exchange_type, "routing_key": routing_key}
        self._control.operations.consume(*self._control.make_queue({**place, **options}))

    def cancel_task_queue(self, queue: str) -> None:
        """Stop consuming a queue."""
        self._control.operations.cancel(queue)


class PanelState:
    """`state`."""

    def __init__(self, control: Control) -> None:
        self.app = control.app
        self.hostname = control.worker.setup.hostname
        self.consumer = ConsumerView(control)

    @staticmethod
    def tset(values: Iterable[object]) -> set[object]:
        """A copy that does not change while a command iterates over it (Celery's commands use this name)."""
        return set(values)
