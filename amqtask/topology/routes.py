"""Where a call goes: task name, options and `task_routes` → exchange, routing key, and what to declare first.

The order is Celery's: a `queue` among the call's options wins; else `task_routes` are asked, under the call's other
options; else the default queue.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from amqtask.exceptions import ConfigurationError, QueueNotFound
from amqtask.ground.plugins import load_path, near_names
from amqtask.ground.printable import bounded_logger
from amqtask.protocol.entities import Declaration, Exchange, Queue, arguments, queue_of
from amqtask.protocol.option_types import CALL
from amqtask.topology.declarations import (
    QueueDefaults,
    base_of,
    declarations,
    has_shards,
    is_declarable,
    shard_name,
    shard_of,
    with_defaults,
    work_queue,
)

if TYPE_CHECKING:
    from amqtask.flow.keys import FairPlan
    from amqtask.ground.shapes import Keywords, OptionDict, Options

Target: TypeAlias = "str | Queue | Mapping[str, Any]"
RouteFunction: TypeAlias = Callable[..., "Target | None"]

logger = bounded_logger(__name__)
_OWN_OPTIONS = ("queue", "exchange", "exchange_type", "routing_key")


class Route(NamedTuple):
    """Where to publish. `queue` is None when only an exchange is known.

    `options` are the call's options merged with the route's, without the routing options. A broadcast is not `mandatory`:
    there may be no consumer.
    """

    exchange: str
    routing_key: str
    queue: Queue | None
    declare: tuple[Declaration, ...]
    options: OptionDict
    mandatory: bool = True


class FairTask(Protocol):
    """What a route needs to know of a task that may have `fair_by`."""

    @property
    def fair_plan(self) -> FairPlan | None: ...


def configured(queues: object, default: Exchange | None) -> Iterator[Queue]:
    """Queues from a list of Queue, names or kombu's queues, or from Celery's mapping of names.

    Raises: ConfigurationError for anything else.
    """
    if queues is None:
        return
    if isinstance(queues, Mapping):
        for name, options in queues.items():
            yield _from_mapping(str(name), options or {}, default)
        return
    if isinstance(queues, (str, Queue)) or not isinstance(queues, Iterable):
        queues = [queues]
    for entry in queues:
        if isinstance(entry, Queue):
            yield entry
        elif isinstance(entry, str):
            yield Queue(entry, routing_key=entry)
        else:
            yield _from_entity(entry)


def _from_mapping(name: str, options: Options, default: Exchange | None) -> Queue:
    """Celery's dictionary form: exchange, exchange_type, routing_key (or binding_key), queue_arguments."""
    exchange = options.get("exchange")
    if isinstance(exchange, str):
        exchange = Exchange(exchange, type=str(options.get("exchange_type", "direct")))
    key = options.get("routing_key") or options.get("binding_key") or name
    queue_arguments = options.get("queue_arguments") or options.get("arguments")
    return Queue(name, exchange=exchange or default, routing_key=str(key), arguments=arguments(queue_arguments))


def _from_entity(entity: Any) -> Queue:
    try:
        return queue_of(entity)
    except AttributeError as error:
        raise ConfigurationError(f"task_queues holds {entity!r}, which is no Queue: {error}") from error


class Queues:
    """The queues of an app: those of `task_queues`, those created because a name was used, and which of them are consumed."""

    def __init__(
        self,
        task_queues: Iterable[Queue] = (),
        *,
        defaults: QueueDefaults | None = None,
        default_queue: str = "amqtask",
        default_exchange: Exchange | None = None,
        default_routing_key: str = "",
        create_missing: bool = True,
        create_missing_type: str | None = None,
        create_missing_exchange_type: str | None = None,
        shards: int = 32,
        fair_queues: Callable[[], Container[str]] = frozenset,
    ) -> None:
        self.defaults = defaults or QueueDefaults()
        self.default_queue = default_queue
        self._default_exchange = default_exchange
        self._default_routing_key = default_routing_key
        # How many shards a queue with fair tasks has, and which queues have such tasks.
        self.shards = shards
        self._fair_queues = fair_queues
        self._create_missing = create_missing
        self._create_missing_type = create_missing_type
        self._create_missing_exchange_type = create_missing_exchange_type
        self._queues: dict[str, Queue] = {}
        self._declared: dict[str, tuple[Declaration, ...]] = {}
        self._selected: dict[str, Queue] | None = None
        self._configured: set[str] = set()
        for queue in task_queues:
            self._configured.add(self.add(queue).name)
        # Whether the configuration says which queues there are.
        self._is_explicit = bool(self._configured)
        if not self._configured:
            self._configured.add(self.add(self._make(default_queue)).name)

    def add(self, queue: Queue) -> Queue:
        """Add a queue, with the default arguments where it has none; it replaces a queue of the same name."""
        queue = with_defaults(queue, self.defaults)
        # Before the queue can be found: another thread may look for both.
        self._declared[queue.name] = declarations(queue, self.defaults)
        self._queues[queue.name] = queue
        return queue

    def __getitem__(self, name: str) -> Queue:
        """The queue of that name, created if it is missing. Raises: QueueNotFound when that is switched off."""
        queue = self._queues.get(name)
        if queue is not None:
            return queue
        created = self._create(name)
        if self._is_explicit and name != self.default_queue and base_of(name) == name:
            logger.warning(
                "queue %r is not in task_queues, and is made: a worker reads it only with -Q%s "
                "(task_create_missing_queues = False makes this an error)",
                name, _near(name, self._configured),
            )  # fmt: skip
        return created

    def __contains__(self, name: object) -> bool:
        return name in self._queues

    def __iter__(self) -> Iterator[str]:
        return iter(self._queues)

    def __len__(self) -> int:
        return len(self._queues)

    def declarations(self, queue: Queue) -> tuple[Declaration, ...]:
        """The queue's declarations; computed once for each queue of the app."""
        if self._queues.get(queue.name) is queue:
            return self._declared[queue.name]
        return declarations(queue, self.defaults)

    # -- what a worker consumes (-Q, -X)

    @property
    def consumed(self) -> tuple[Queue, ...]:
        """The selected queues; without a selection all of the configuration's, else the default queue; and their shards."""
        return self.with_shards(self._chosen().values())

    def with_shards(self, queues: Iterable[Queue]) -> tuple[Queue, ...]:
        """These queues, and the shards of those that have fair tasks."""
        fair = self._fair_queues()
        return tuple(dict.fromkeys(each for queue in queues for each in (queue, *self._shards_of(queue, fair))))

    def _shards_of(self, queue: Queue, fair: Container[str]) -> list[Queue]:
        if queue.name not in fair or not has_shards(queue):
            return []
        return [self[shard_name(queue.name, number)] for number in range(self.shards)]

    def _chosen(self) -> dict[str, Queue]:
        if self._selected is not None:
            return self._selected
        return {name: queue for name, queue in self._queues.items() if name in self._configured}

    def select(self, names: Iterable[str]) -> None:
        """Consume these only (-Q); missing ones are created. Raises: QueueNotFound."""
        self._selected = {name: self._queues.get(name) or self._create(name) for name in names}

    def deselect(self, names: Iterable[str]) -> None:
        """Consume all but these (-X). Raises: QueueNotFound for a name that is not consumed anyway."""
        chosen = dict(self._chosen())
        for name in names:
            if chosen.pop(name, None) is None:
                raise QueueNotFound(f"queue {name!r} is not consumed, so it can't be excluded{_near(name, chosen)}")
        self._selected = chosen

    # -- missing queues

    def _create(self, name: str) -> Queue:
        if base_of(name) != name:
            return self.add(shard_of(self[base_of(name)], name))
        if not self._create_missing:
            raise QueueNotFound(
                f"no queue {name!r} in task_queues, and task_create_missing_queues is off{_near(name, self._queues)}"
            )
        return self.add(self._make(name))

    def _make(self, name: str) -> Queue:
        queue_type, exchange, routing_key = self._create_missing_type, None, ""
        if name == self.default_queue:
            queue_type, exchange, routing_key = None, self._default_exchange, self._default_routing_key
        elif self._create_missing_exchange_type:  # as in Celery: an exchange of the queue's name, bound under it
            exchange, routing_key = Exchange(name, type=self._create_missing_exchange_type), name
        return work_queue(
            name,
            self.defaults,
            exchange=exchange,
            routing_key=routing_key,
            queue_arguments={"x-queue-type": queue_type} if queue_type else None,
        )


def _near(name: str, names: Iterable[str]) -> str:
    near = near_names(name, names, most=3)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


# -- task_routes


def _checked_options(name: str, target: Options) -> Options:
    """Raises: ConfigurationError for a key that is no option of a call."""
    for key in target:
        if key not in CALL:
            near = near_names(str(key), _OWN_OPTIONS) or near_names(str(key), CALL)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigurationError(
                f"task_routes: the route of task {name!r} has {key!r}, which is not an option of a call{hint}"
            )
    return target


def compile_routes(routes: object) -> tuple[RouteFunction, ...]:
    """The setting `task_routes` as functions: a mapping, a function, a dotted path to one, or a list of those.

    Raises: ConfigurationError for anything else.
    """
    if not routes:
        return ()
    if isinstance(routes, (list, tuple)) and not _are_pairs(routes):
        return tuple(_compile(route) for route in routes)
    return (_compile(routes),)


def _are_pairs(routes: Sequence[object]) -> bool:
    return all(
        isinstance(route, (list, tuple)) and len(route) == 2 and isinstance(route[0], (str, re.Pattern))
        for route in routes
    )


def _compile(route: object) -> RouteFunction:
    if isinstance(route, Mapping) or (isinstance(route, (list, tuple)) and _are_pairs(route)):
        return _MapRoute(dict(route))
    if isinstance(route, str):
        route = _imported(route)
    method = getattr(route, "route_for_task", None)
    if isinstance(route, type) and method is not None:
        method = route().route_for_task
    if method is not None:
        return lambda name, args, kwargs, options, task=None: method(name, args, kwargs)
    if callable(route):
        function: RouteFunction = route
        return function
    raise ConfigurationError(f"task_routes: {route!r} is not a mapping, function, router or dotted path to one")


def _imported(path: str) -> object:
    try:
        return load_path(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(f"task_routes: cannot import {path!r}: {error}") from error


class _MapRoute:
    """Exact names first, then globs and regular expressions in their order."""

    def __init__(self, routes: Mapping[str | re.Pattern[str], Target]) -> None:
        self._exact: dict[str, Target] = {}
        self._patterns: list[tuple[re.Pattern[str], Target]] = []
        for name, target in routes.items():
            if isinstance(name, re.Pattern):
                self._patterns.append((name, target))
            elif any(mark in name for mark in "*?["):
                self._patterns.append((re.compile(fnmatch.translate(name)), target))
            else:
                self._exact[name] = target
            if isinstance(target, Mapping):
                _checked_options(name if isinstance(name, str) else name.pattern, target)

    def __call__(self, name: str, *_args: object, **_options: object) -> Target | None:
        if name in self._exact:
            return self._exact[name]
        return next((target for pattern, target in self._patterns if pattern.match(name)), None)


def _own_route(task: Any) -> OptionDict:
    if task is None:
        return {}
    route = {"queue": task.queue, "exchange": task.exchange, "routing_key": task.routing_key}
    return {key: value for key, value in route.items() if value is not None}


class Router:
    """Routes calls: by their options, else `routes` (the setting `task_routes`), else those of the task (`find_task(name)`)."""

    def __init__(
        self, routes: object, queues: Queues, find_task: Callable[[str], object | None] = lambda name: None
    ) -> None:
        self._routes = compile_routes(routes)
        self._queues = queues
        self._find_task = find_task
        # The queues of tasks with `fair_by`, None for one whose queue has no shards.
        self._fair: dict[str, str | None] = {}

    def route(
        self,
        name: str,
        args: Sequence[object] = (),
        kwargs: Keywords | None = None,
        options: Options | None = None,
        task: object = None,
    ) -> Route:
        """The route of this call. Raises: QueueNotFound, ConfigurationError."""
        merged = self._merge(name, args, kwargs or {}, options or {}, task)
        queue, exchange = merged.get("queue"), merged.get("exchange")
        routing_key = merged.get("routing_key")
        call_options = {key: value for key, value in merged.items() if key not in _OWN_OPTIONS}
        if queue is None and exchange is not None:
            return self._to_exchange(exchange, routing_key, call_options)
        if queue is None or isinstance(queue, str):
            queue = self._queues[queue or self._queues.default_queue]
        return self._to_queue(queue, exchange, routing_key, call_options)

    def shared(self, route: Route, name: str, args: Sequence[object], kwargs: Keywords, task: FairTask) -> Route:
        """The route of a call of a task with `fair_by`: to the shard of its key, if it goes to the task's own queue."""
        queue = route.queue
        if task.fair_plan is None or queue is None or route.exchange or queue.name != self.fair_queue(name, task):
            return route
        shard = self._queues[shard_name(queue.name, task.fair_plan.shard(args, kwargs, self._queues.shards))]
        return route._replace(routing_key=shard.name, queue=shard, declare=self._queues.declarations(shard))

    def fair_queue(self, name: str, task: object) -> str | None:
        """The queue to which a task's calls go that name none, if it has shards; None where that depends on the call."""
        if name not in self._fair:
            try:
                route = self.route(name, task=task)
            except Exception as error:  # noqa: BLE001 - a user's route function, which may need a call's arguments
                logger.warning("fair_by of task %s has no effect: its queue depends on the call (%r)", name, error)
                self._fair[name] = None
            else:
                has_own = route.queue is not None and not route.exchange and has_shards(route.queue)
                self._fair[name] = route.queue.name if has_own and route.queue is not None else None
                if not has_own:
                    logger.warning("fair_by of task %s has no effect: it goes to no queue that can have shards", name)
        return self._fair[name]

    def _merge(self, name: str, args: Sequence[object], kwargs: Keywords, options: Options, task: object) -> OptionDict:
        given_options = {key: value for key, value in options.items() if value is not None}
        if "queue" in given_options:
            return given_options
        return {**self._ask(name, args, kwargs, given_options, task), **given_options}

    def _ask(
        self, name: str, args: Sequence[object], kwargs: Keywords, options: OptionDict, task: object
    ) -> OptionDict:
        for route in self._routes:
            target = route(name, args, kwargs, options, task=task)
            if target is None:
                continue
            if isinstance(target, (str, Queue)):
                return {"queue": target}
            if isinstance(target, Mapping):
                return {key: value for key, value in _checked_options(name, target).items() if value is not None}
            raise ConfigurationError(f"task_routes: the route of task {name!r} is {target!r}, no queue or mapping")
        return _own_route(task if task is not None else self._find_task(name))

    def _to_exchange(self, exchange: str | Exchange, routing_key: str | None, options: OptionDict) -> Route:
        declare: tuple[Declaration, ...] = ()
        if isinstance(exchange, Exchange):
            declare = (exchange,) if is_declarable(exchange) else ()
            exchange = exchange.name
        return Route(exchange, routing_key or "", None, declare, options)

    def _to_queue(
        self, queue: Queue, exchange: str | Exchange | None, routing_key: str | None, options: OptionDict
    ) -> Route:
        declare = self._queues.declarations(queue)
        queue_exchange = queue.exchange
        if isinstance(exchange, Exchange):
            declare = (*declare, exchange) if is_declarable(exchange) else declare
            exchange = exchange.name
        if queue_exchange is None or queue_exchange.type == "direct":
            # A direct exchange adds nothing to the queue's own name, and cannot lack the binding (as in Celery).
            if not exchange or routing_key is None:
                return Route("", queue.name, queue, declare, options)
            return Route(exchange, routing_key, queue, declare, options)
        target = exchange if exchange is not None else queue_exchange.name
        key = routing_key if routing_key is not None else queue.routing_key
        return Route(target, key, queue, declare, options, mandatory=not queue.broadcast)
