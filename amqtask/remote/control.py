"""Remote control, the client's end: tell workers and ask them, over Celery's pidbox exchanges."""

from __future__ import annotations

import itertools
import re
import time
import uuid
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from amqtask.exceptions import ConfigurationError, DuplicateNodenameWarning, MessageError, PublishError, QueueNotFound
from amqtask.ground.lazy import lazy
from amqtask.ground.printable import printable
from amqtask.protocol.control import (
    CANCEL,
    TREE,
    Command,
    check_pattern,
    command_message,
    read_reply,
    reply_exchange,
    reply_queue,
)
from amqtask.remote.commands import MATCHERS
from amqtask.remote.kept import KEPT, NOTE, ORDERS, Pauses

if TYPE_CHECKING:
    from amqtask.ground.shapes import CommandArguments, Headers, Options, Replies
    from amqtask.protocol.control import Reply
    from amqtask.protocol.message import Delivery
    from amqtask.remote.kept import KeptRevokes
    from amqtask.transport.broker import Broker
    from amqtask.transport.contract import Publisher


Callback = Callable[[dict[str, Any]], object]

# -- Inspect: what workers can be asked, by Celery's names (celery/app/control.py).


@dataclass(frozen=True, slots=True, kw_only=True)
class AskOptions:
    """Which nodes are asked (None: all), and how long answers are waited for. `matcher` is glob or pcre, `timeout` seconds."""

    destination: str | Sequence[str] | None = None
    timeout: float = 1.0
    limit: int | None = None
    pattern: str | None = None
    matcher: str | None = None
    callback: Callback | None = None


class Inspect:
    """Asks workers of one application; `app` is another one, `connection` is taken for Celery's sake. Each question returns
    {node: answer}, or None when nobody answered (as in Celery)."""

    control: Control

    def __init__(
        self,
        destination: str | Sequence[str] | None = None,
        timeout: float = 1.0,
        callback: Callback | None = None,
        connection: object = None,
        app: Any = None,
        limit: int | None = None,
        pattern: str | None = None,
        matcher: str | None = None,
    ) -> None:
        self._control: Control = self.control if app is None else app.control
        self._options = AskOptions(
            destination=destination,
            timeout=timeout,
            limit=limit,
            pattern=pattern,
            matcher=matcher,
            callback=callback,
        )

    def _request(self, command: str, **arguments: object) -> Replies | None:
        """Any question, a custom one too, under Celery's name for this method."""
        return self._control.ask_them(command, arguments, self._options) or None

    def ping(self, destination: Sequence[str] | None = None) -> Replies | None:
        """Who is there: {"ok": "pong"}."""
        if not destination:
            return self._request("ping")
        old = self._options
        options = AskOptions(destination=destination, timeout=old.timeout, callback=old.callback)
        return self._control.ask_them("ping", {}, options) or None

    def active(self, safe: bool | None = None) -> Replies | None:
        """What runs; with `safe` arguments are told as text and nothing is decoded for it."""
        return self._request("active", safe=safe)

    def reserved(self, safe: bool | None = None) -> Replies | None:
        """What was delivered and waits for a slot."""
        return self._request("reserved", safe=safe)

    def scheduled(self, safe: bool | None = None) -> Replies | None:
        """What waits in workers for its time: nearly nothing here, delays are the broker's."""
        return self._request("scheduled", safe=safe)

    def revoked(self) -> Replies | None:
        """Ids of revoked tasks."""
        return self._request("revoked")

    def registered(self, *taskinfoitems: str) -> Replies | None:
        """Tasks that workers know, with these attributes (exchange, routing_key and rate_limit if none is named)."""
        return self._request("registered", taskinfoitems=list(taskinfoitems))

    registered_tasks = registered

    def stats(self) -> Replies | None:
        """Statistics of workers."""
        return self._request("stats")

    def active_queues(self) -> Replies | None:
        """What workers consume."""
        return self._request("active_queues")

    def conf(self, with_defaults: bool = False) -> Replies | None:
        """Settings, secrets starred out."""
        return self._request("conf", with_defaults=with_defaults)

    def query_task(self, *ids: str | Sequence[str]) -> Replies | None:
        """What workers know of tasks: {node: {id: [state, info]}}; ids one by one, or one list."""
        task_ids = ids[0] if len(ids) == 1 and isinstance(ids[0], (list, tuple)) else ids
        return self._request("query_task", ids=list(task_ids))

    def clock(self) -> Replies | None:
        """Logical clocks of workers."""
        return self._request("clock")

    def report(self) -> Replies | None:
        """Versions and settings, as {"ok": text}."""
        return self._request("report")

    def hello(self, from_node: str, revoked: Sequence[str] | None = None) -> Replies | None:
        """What a worker that starts asks: the others' revoked ids, and it tells its own."""
        return self._request("hello", from_node=from_node, revoked=revoked)

    def memsample(self) -> Replies | None:
        """Memory that workers' main processes have in use, in words; kept for `memdump`."""
        return self._request("memsample")

    def memdump(self, samples: int = 10) -> Replies | None:
        """What earlier memsamples said, as text."""
        return self._request("memdump", samples=samples)

    def objgraph(self, type: str = "Request", n: int = 200, max_depth: int = 10) -> Replies | None:
        """Draw what refers to objects of a type: {"filename": …} on the worker's machine; needs objgraph there."""
        return self._request("objgraph", num=n, max_depth=max_depth, type=type)


# Seconds that connecting for the replies may take, on top of the time that they are waited for.
CONNECT_SECONDS = 5.0


class Control:
    """`app.control`: Celery's names. Times are seconds; `destination` is node names, None for all."""

    def __init__(
        self,
        broker: Broker,
        publisher: Publisher,
        *,
        prefix: str,
        accept: frozenset[str],
        serializer: str = "json",
        queues: Callable[[], Sequence[str]] = tuple,
        keep_revokes: Callable[[], KeptRevokes | None] = lambda: None,
    ) -> None:
        self._broker = broker
        self._publisher = publisher
        self._prefix = prefix
        self._accept = accept
        self._serializer = serializer
        self._queues = queues
        self._keep_revokes = keep_revokes
        self._clock = itertools.count(1)

    # -- the two roads

    def broadcast(
        self,
        command: str,
        arguments: CommandArguments | None = None,
        destination: Sequence[str] | None = None,
        connection: object = None,
        reply: bool = False,
        timeout: float = 1.0,
        limit: int | None = None,
        callback: Callback | None = None,
        channel: object = None,
        pattern: str | None = None,
        matcher: str | None = None,
        **extra: object,
    ) -> list[Replies] | None:
        """Send a command; with `reply` the answers that came within `timeout` seconds, as [{node: answer}, …].

        `limit` answers are enough (with `destination` as many as it names); `callback` gets each {node: answer} as it
        comes. `pattern` names nodes by `matcher`, glob (the default) or pcre. Further keyword arguments are the
        command's. `connection` and `channel` are taken for Celery's sake, and not used.
        Raises: PublishError, ConfigurationError (no such matcher).
        """
        arguments = {**(arguments or {}), **extra}
        options = AskOptions(
            destination=destination,
            timeout=timeout,
            limit=limit,
            pattern=pattern,
            matcher=matcher,
            callback=callback,
        )
        if not reply:
            self._send(command, arguments, options)
            return None
        return [{answer.nodename: answer.payload} for answer in self._collect(command, arguments, options)]

    def ask(self, command: str, arguments: CommandArguments, **options: Any) -> Replies:
        """Send a command and collect the answers by node, until the timeout or as many as were asked. The options are those of
        AskOptions. Raises: PublishError."""
        return self.ask_them(command, arguments, AskOptions(**options))

    def ask_them(self, question: str, arguments: CommandArguments, options: AskOptions) -> Replies:
        """Send a command and collect the answers by node. Warns of nodes that answered twice."""
        answers = self._collect(question, arguments, options)
        payloads = {answer.nodename: answer.payload for answer in answers}
        if len(payloads) < len(answers):
            names = [answer.nodename for answer in answers]
            twice = sorted({name for name in names if names.count(name) > 1})
            warnings.warn(
                f"several workers answered as {', '.join(twice)}: give each worker a name of its own (-n w2@%h)",
                DuplicateNodenameWarning,
                stacklevel=3,
            )
        return payloads

    def _collect(self, command: str, arguments: CommandArguments, options: AskOptions) -> list[Reply]:
        oid, ticket = str(uuid.uuid4()), str(uuid.uuid4())
        answers: list[Reply] = []
        names = _destination(options)
        enough = options.limit or len(set(names or ()))

        def on_reply(delivery: Delivery) -> None:
            answer = self._read(delivery)
            if answer is None or answer.ticket != ticket:
                return
            answers.append(answer)
            if options.callback is not None:
                options.callback({answer.nodename: answer.payload})

        replies = self._broker.queue_reader(reply_queue(oid, self._prefix), on_reply, name="amqtask control")
        try:
            replies.ensure(timeout=CONNECT_SECONDS)
            self._send(command, arguments, options, ticket=ticket, reply_to=oid)
            deadline = time.monotonic() + options.timeout
            replies.drive(lambda: 0 < enough <= len(answers), deadline)
        finally:
            replies.close()
        return answers

    def _read(self, delivery: Delivery) -> Reply | None:
        try:
            return read_reply(*delivery.content, self._accept)
        except MessageError:
            return None  # a node that answers in a serializer that we do not accept

    def _send(
        self,
        command: str,
        arguments: CommandArguments,
        options: AskOptions,
        *,
        ticket: str | None = None,
        reply_to: str | None = None,
    ) -> None:
        clock, trouble = next(self._clock), None
        if command in ORDERS and not options.destination and not options.pattern:
            arguments, trouble = self._keep(command, arguments)
        message = command_message(
            Command(
                method=command,
                arguments=arguments,
                destination=_destination(options),
                pattern=options.pattern or None,
                matcher=_matcher(options),
                ticket=ticket,
                reply_exchange=reply_exchange(self._prefix).name if reply_to else "",
                reply_key=reply_to or "",
                expires=time.time() + options.timeout,
            ),
            self._prefix,
            serializer=self._serializer,
            clock=clock,
        )
        message.mandatory = False  # no worker may be there, and that is an answer too
        self._publisher.publish(message)
        if trouble is not None:
            raise trouble

    def _keep(self, order: str, arguments: CommandArguments) -> tuple[CommandArguments, PublishError | None]:
        """Have the broker keep the order. When it cannot now, it is sent all the same: a worker that hears it writes it down."""
        kept = self._kept_revokes
        try:
            is_kept = kept is not None and kept.keep(order, arguments)
        except PublishError as error:
            return arguments, error
        return {**arguments, KEPT: True} if is_kept else arguments, None

    @lazy
    def _kept_revokes(self) -> KeptRevokes | None:
        return self._keep_revokes()

    # -- orders

    def revoke(
        self,
        task_id: str | Sequence[str],
        destination: Sequence[str] | None = None,
        terminate: bool = False,
        signal: str = "SIGTERM",
        **kwargs: Any,
    ) -> Any:
        """Tell workers not to run a task (or several); with `terminate` to end it if it runs, by this signal (prefork).

        The broker keeps the order for workers that start later, unless `destination` or a `pattern` says who is meant.
        Keyword arguments of all orders are those of `broadcast`. Raises: PublishError.
        """
        ids = task_id if isinstance(task_id, str) else list(task_id)
        arguments = {"task_id": ids, "terminate": terminate, "signal": signal}
        return self.broadcast("revoke", arguments, destination, **kwargs)

    def cancel(
        self,
        task_id: str | Sequence[str],
        *,
        tree: bool = True,
        terminate: bool = False,
        signal: str = "SIGTERM",
        **kwargs: Any,
    ) -> Any:
        """Revoke a task (or several), and ask it to end if it runs: `self.is_cancelled()` is true in it then, and a coroutine of
        the asyncio pool is cancelled. With `tree` the ids may be groups', too, and it is for all that belongs to them. Celery's
        workers take it for a revoke of the ids. `terminate` and the rest are as with `revoke`.
        """
        ids = [task_id] if isinstance(task_id, str) else list(task_id)
        arguments = {"task_id": ids, "terminate": terminate, "signal": signal, CANCEL: True, TREE: tree}
        return self.broadcast("revoke", arguments, **kwargs)

    def revoke_by_stamped_headers(
        self,
        headers: Headers,
        destination: Sequence[str] | None = None,
        terminate: bool = False,
        signal: str = "SIGTERM",
        **kwargs: Any,
    ) -> Any:
        """Tell workers not to run tasks with these stamps: {stamp: value or list of values}; see `revoke`."""
        arguments = {"headers": dict(headers), "terminate": terminate, "signal": signal}
        return self.broadcast("revoke_by_stamped_headers", arguments, destination, **kwargs)

    def terminate(
        self,
        task_id: str | Sequence[str],
        destination: Sequence[str] | None = None,
        signal: str = "SIGTERM",
        **kw: object,
    ) -> Any:
        """Revoke, and end it if it runs."""
        return self.revoke(task_id, destination, True, signal, **kw)

    def ping(self, destination: Sequence[str] | None = None, timeout: float = 1.0, **kwargs: Any) -> Any:
        """[{node: {"ok": "pong"}}, …]."""
        return self.broadcast("ping", {}, destination, reply=True, timeout=timeout, **kwargs)

    def shutdown(self, destination: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Warm shutdown of workers."""
        return self.broadcast("shutdown", {}, destination, **kwargs)

    def rate_limit(self, task_name: str, rate_limit: Any, destination: Sequence[str] | None = None, **kw: Any) -> Any:
        """Another rate limit for a task."""
        return self.broadcast("rate_limit", {"task_name": task_name, "rate_limit": rate_limit}, destination, **kw)

    def time_limit(
        self,
        task_name: str,
        soft: float | None = None,
        hard: float | None = None,
        destination: Sequence[str] | None = None,
        **kw: Any,
    ) -> Any:
        """Other time limits for a task."""
        return self.broadcast("time_limit", {"task_name": task_name, "soft": soft, "hard": hard}, destination, **kw)

    def add_consumer(
        self,
        queue: str,
        exchange: str | None = None,
        exchange_type: str = "direct",
        routing_key: str | None = None,
        options: Options | None = None,
        destination: Sequence[str] | None = None,
        *,
        slots: int | str | None = None,
        **kw: Any,
    ) -> Any:
        """Consume a queue too; or give one that is consumed other slots (2, "2+", "1-4")."""
        arguments = {
            "queue": queue,
            "exchange": exchange,
            "exchange_type": exchange_type,
            "routing_key": routing_key,
            **({} if slots is None else {"slots": slots}),
            **(options or {}),
        }
        return self.broadcast("add_consumer", arguments, destination, **kw)

    def cancel_consumer(self, queue: str, destination: Sequence[str] | None = None, **kw: Any) -> Any:
        """Stop consuming a queue."""
        return self.broadcast("cancel_consumer", {"queue": queue}, destination, **kw)

    def pause_queue(self, queue: str, by: str | None = None, *, timeout: float = 1.0) -> Replies:
        """Have no worker of ours consume the queue until `resume_queue`, whatever restarts: the broker keeps that.

        What a worker has begun goes on; what it only holds goes back. Returns what workers that are there answer, by node.
        `by` is who does it (user@host). Raises: OperationalError.
        """
        self.pauses.pause(queue, by)
        return self.ask("pause_queue", {"queue": queue}, timeout=timeout)

    def resume_queue(self, queue: str, *, timeout: float = 1.0) -> Replies:
        """Have workers consume a paused queue again. Returns and raises like `pause_queue`."""
        self.pauses.resume(queue)
        return self.ask("resume_queue", {"queue": queue}, timeout=timeout)

    @lazy
    def pauses(self) -> Pauses:
        """The paused queues, as the broker keeps them."""
        return Pauses(self._broker.note(NOTE))

    def autoscale(self, max: int, min: int, destination: Sequence[str] | None = None, **kw: Any) -> Any:
        """Other bounds for autoscale."""
        return self.broadcast("autoscale", {"max": max, "min": min}, destination, **kw)

    def pool_grow(
        self, n: int = 1, destination: Sequence[str] | None = None, *, pool: str | None = None, **kw: Any
    ) -> Any:
        """More slots; where a worker has several pools, of the first or of `pool`."""
        return self.broadcast("pool_grow", {"n": n} if pool is None else {"n": n, "pool": pool}, destination, **kw)

    def pool_shrink(
        self, n: int = 1, destination: Sequence[str] | None = None, *, pool: str | None = None, **kw: Any
    ) -> Any:
        """Fewer slots; as `pool_grow`."""
        return self.broadcast("pool_shrink", {"n": n} if pool is None else {"n": n, "pool": pool}, destination, **kw)

    def enable_events(self, destination: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Have workers send task events, as `-E` does."""
        return self.broadcast("enable_events", {}, destination, **kwargs)

    def disable_events(self, destination: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Have workers send no task events any more."""
        return self.broadcast("disable_events", {}, destination, **kwargs)

    def heartbeat(self, destination: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Have workers send a heartbeat event now."""
        return self.broadcast("heartbeat", {}, destination, **kwargs)

    def pool_restart(
        self,
        modules: Sequence[str] | None = None,
        reload: bool = False,
        reloader: object = None,
        destination: Sequence[str] | None = None,
        **kw: Any,
    ) -> Any:
        """Replace the pool's processes, each after its task; `modules` are imported before, or with `reload` again."""
        arguments = {"modules": modules, "reload": reload, "reloader": reloader}
        return self.broadcast("pool_restart", arguments, destination, **kw)

    def election(self, id: str, topic: str, action: object = None, connection: object = None) -> None:
        """Have exactly one of the workers call a task: `action` is its signature, `topic` "task", `id` made up for the occasion.

        See docs/remote-control.md for how Celery's workers differ."""
        self.broadcast("election", {"id": id, "topic": topic, "action": action})

    def purge(self, connection: object = None) -> int:
        """Delete what waits in this app's queues; how many messages that were. They cannot be brought back."""
        total = 0
        with self._broker.queue_jobs() as jobs:
            for queue in self._queues():
                try:
                    total += jobs.purge(queue)
                except QueueNotFound:
                    continue
        return total

    discard_all = purge

    @lazy
    def inspect(self) -> type[Inspect]:
        """Questions: `app.control.inspect().active()`; for the arguments see `broadcast`."""
        return type("Inspect", (Inspect,), {"control": self})

    def close(self) -> None:
        """Do nothing: no connection stays open between commands."""


def _destination(options: AskOptions) -> tuple[str, ...] | None:
    names = options.destination
    return ((names,) if isinstance(names, str) else tuple(names)) if names else None


def _matcher(options: AskOptions) -> str | None:
    """Celery's workers look at a pattern only if a matcher is named."""
    if not options.pattern:
        return None
    if options.matcher not in (None, *MATCHERS):
        raise ConfigurationError(f"there is no matcher {options.matcher!r}: it is {' or '.join(MATCHERS)}")
    try:
        check_pattern(options.pattern, options.matcher)
    except re.error as error:
        raise ConfigurationError(f"the pattern {options.pattern!r} is not a regular expression: {error}") from error
    except ValueError as error:
        raise ConfigurationError(
            f"workers do not try the pattern {printable(options.pattern, 100)!r}: {error}"
        ) from error
    return options.matcher or "glob"
