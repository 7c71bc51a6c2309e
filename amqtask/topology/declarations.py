"""The plan of declarations: which arguments a queue gets, its dead-letter queue, and the order to declare in."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple
from uuid import uuid4

from amqtask.protocol.entities import Arguments, Binding, Declaration, Exchange, Queue, arguments
from amqtask.protocol.result import is_reply_queue

if TYPE_CHECKING:
    from amqtask.ground.shapes import QueueArgumentDict, QueueArguments

QUORUM = "quorum"
CLASSIC = "classic"

# From more quorum queues on there is a warning: RabbitMQ 3.10 opens three files for each, and the usual limit is 1,024.
MANY_QUORUM_QUEUES = 200

# The broker counts a delivery of all that was prefetched over a connection that is lost, whether or not a task began. So its own
# limit, past which it dead-letters by itself, is so many times the workers' one, who know what became of their connections.
_BROKER_FACTOR = 4

# RabbitMQ 4 gives every quorum queue a delivery limit of 20; reading a dead-letter queue and requeuing the message
# must never drop it. (-1, which means "no limit" in 4.x, is refused by 3.x.)
_NO_LIMIT = 1_000_000

# RabbitMQ 4.3 keeps what was delivered over a node that is gone for consumers there, for a minute by default, in case the node
# comes back; earlier versions give it to others at once, and ignore the argument (rabbit_fifo, consumer_disconnected_timeout).
DISCONNECTED = {"x-consumer-disconnected-timeout": 500}

# Mailboxes of remote control, and the queues in which this library keeps what is its own.
_NO_TASKS = r"(?s).*\.pidbox|amqtask\.(beat|cancel|chord|config|delay)(\..*)?"


def may_hold_tasks(name: str) -> bool:
    """Whether a queue of that name may be one of tasks: for a name that only a message gives, whose body anybody may have
    written, before it is published there with the rights of whoever runs it again."""
    return bool(name) and re.fullmatch(_NO_TASKS, name) is None and not is_reply_queue(name)


class QueueDefaults(NamedTuple):
    """The default arguments of a queue.

    `delivery_limit` is how often workers run a message whose process dies; None leaves the limit to the broker. `max_priority` is
    for classic queues (quorum queues refuse it).
    """

    queue_type: str = QUORUM
    delivery_limit: int | None = 5
    dead_letter: bool = True
    dead_letter_suffix: str = ".dead"
    max_priority: int | None = None


def broker_limit(delivery_limit: int | None) -> int | None:
    """The `x-delivery-limit` of queues whose messages workers deliver at most `delivery_limit` times."""
    return None if delivery_limit is None else delivery_limit * _BROKER_FACTOR


def work_queue(
    name: str,
    defaults: QueueDefaults,
    *,
    exchange: Exchange | None = None,
    routing_key: str = "",
    queue_arguments: QueueArguments | Arguments | None = None,
    durable: bool = True,
    exclusive: bool = False,
    auto_delete: bool = False,
    bindings: tuple[Binding, ...] = (),
    broadcast: bool = False,
) -> Queue:
    """A queue with its own arguments, and the default ones where it has none; an argument that is None is left out."""
    queue = Queue(
        name=name,
        exchange=exchange,
        routing_key=routing_key,
        durable=durable,
        exclusive=exclusive,
        auto_delete=auto_delete,
        arguments=arguments(queue_arguments),
        bindings=bindings,
        broadcast=broadcast,
    )
    return with_defaults(queue, defaults)


def with_defaults(queue: Queue, defaults: QueueDefaults) -> Queue:
    """The same queue with default arguments where it has none of its own; exclusive ones are left as they are."""
    if queue.broadcast or queue.exclusive or queue.auto_delete or not queue.durable or queue.passive:
        return queue  # cannot be quorum; and dead letters of a temporary queue would never be read
    argument_map = queue.argument_map
    queue_type = argument_map.get("x-queue-type", defaults.queue_type)
    merged = {**_default_arguments(queue.name, queue_type, argument_map, defaults), **argument_map}
    return replace(queue, arguments=arguments({key: value for key, value in merged.items() if value is not None}))


def _default_arguments(
    name: str, queue_type: str, argument_map: QueueArguments, defaults: QueueDefaults
) -> QueueArgumentDict:
    default_arguments: QueueArgumentDict = {"x-queue-type": queue_type}
    if queue_type == QUORUM:
        default_arguments["x-delivery-limit"] = broker_limit(defaults.delivery_limit)
        default_arguments.update(DISCONNECTED)
    elif queue_type == CLASSIC:
        default_arguments["x-max-priority"] = defaults.max_priority
    else:  # streams have neither limits nor dead letters
        return default_arguments
    if defaults.dead_letter and "x-dead-letter-exchange" not in argument_map:
        default_arguments["x-dead-letter-exchange"] = ""
        default_arguments["x-dead-letter-routing-key"] = base_of(name) + defaults.dead_letter_suffix
        if queue_type == QUORUM and argument_map.get("x-overflow", "reject-publish") == "reject-publish":
            # At-least-once requires reject-publish (rabbitmq.com/docs/quorum-queues, at-least-once dead-lettering).
            default_arguments["x-overflow"] = "reject-publish"
            default_arguments["x-dead-letter-strategy"] = "at-least-once"
    return default_arguments


def dead_letter_queue(queue: Queue, defaults: QueueDefaults) -> Queue | None:
    """The queue that takes this one's dead letters, if it is ours to declare (`<queue>.dead`)."""
    argument_map = queue.argument_map
    target = base_of(queue.name) + defaults.dead_letter_suffix
    if not defaults.dead_letter or argument_map.get("x-dead-letter-exchange") != "":
        return None
    if argument_map.get("x-dead-letter-routing-key") != target:
        return None
    queue_type = argument_map.get("x-queue-type", defaults.queue_type)
    if queue_type != QUORUM:
        return Queue(target, arguments=arguments({"x-queue-type": queue_type}))
    return Queue(target, arguments=arguments({"x-queue-type": queue_type, "x-delivery-limit": _NO_LIMIT}))


def own_dead_letters(queue: Queue, defaults: QueueDefaults) -> str | None:
    """The name of that queue, where it is listed beside this one; None for a shard, whose dead letters are its queue's."""
    dead = dead_letter_queue(queue, defaults)
    return dead.name if dead is not None and base_of(queue.name) == queue.name else None


def is_quorum(queue: Queue) -> bool:
    """Whether it is declared as a quorum queue."""
    return queue.argument_map.get("x-queue-type") == QUORUM


def too_many(queues: Iterable[Queue]) -> str:
    """A warning about the cost of so many quorum queues; empty when they are not many."""
    number = sum(map(is_quorum, queues))
    if number <= MANY_QUORUM_QUEUES:
        return ""
    return (
        f"{number} quorum queues, dead-letter queues among them: each is a process with files of its own on every node "
        "(three on RabbitMQ 3.10), and a node that runs out of files takes no connections. Look at its limit (`ulimit -n`), let "
        "tasks share queues, or declare some as classic"
    )


def as_consumed(queue: Queue) -> Queue:
    """The queue that a worker consumes: for a broadcast its own one, deleted with its connection; else the queue itself."""
    if not queue.broadcast:
        return queue
    return replace(queue, name=f"bcast.{uuid4()}", exclusive=True, auto_delete=False, durable=False)


def direct_queue(hostname: str) -> Queue:
    """With `worker_direct`: the queue of one worker, `<node name>.dq2` on the exchange C.dq2, as Celery declares it."""
    return Queue(f"{hostname}.dq2", exchange=Exchange("C.dq2"), routing_key=hostname)


def declarations(queue: Queue, defaults: QueueDefaults) -> tuple[Declaration, ...]:
    """All declarations of a queue, in an order in which they can be made: exchanges, dead-letter queue, queue, bindings."""
    return tuple(dict.fromkeys(_in_order(queue, defaults)))


def _in_order(queue: Queue, defaults: QueueDefaults) -> Iterator[Declaration]:
    bindings = all_bindings(queue)
    for binding in bindings:
        if is_declarable(binding.source):
            yield binding.source
    if not queue.broadcast:  # each consumer of a broadcast declares its own queue
        dead = dead_letter_queue(queue, defaults)
        if dead is not None:
            yield dead
        yield replace(queue, bindings=())
        yield from bindings


def all_bindings(queue: Queue) -> tuple[Binding, ...]:
    """The binding to the queue's own exchange, then the further ones; the default exchange needs none."""
    exchange_binding: tuple[Binding, ...] = ()
    if queue.exchange is not None and queue.exchange.name:
        exchange_binding = (Binding(queue.exchange, queue.name, queue.routing_key),)
    # A headers exchange is bound by its arguments: an explicit binding to it replaces the one without any.
    if queue.exchange is not None and queue.exchange.type == "headers" and queue.bindings:
        exchange_binding = ()
    return tuple(dict.fromkeys((*exchange_binding, *(binding for binding in queue.bindings if binding.source.name))))


def consumption(queue: Queue, dead_letter: Queue | None = None) -> tuple[Declaration, ...]:
    """The declarations that a consumer of the queue needs, in an order in which they can be made."""
    bindings = all_bindings(queue)
    sources = dict.fromkeys(binding.source for binding in bindings if is_declarable(binding.source))
    dead = (dead_letter,) if dead_letter is not None else ()
    return (*sources, *dead, queue, *bindings)


def is_declarable(exchange: Exchange) -> bool:
    """Whether a client may declare it: the default exchange and the broker's `amq.…` exchanges exist always."""
    return bool(exchange.name) and not exchange.name.startswith("amq.")


# PRECONDITION_FAILED - inequivalent arg 'x-queue-type' for queue 'jobs' in vhost '/': received the value 'quorum' of
# type 'longstr' but current is the value 'classic' …  ("received none but current is …", "received 'true' but …")
_INEQUIVALENT = (
    r"(?s)inequivalent arg '(?P<argument>[^']+)'.*?received (?:the value )?(?P<declared>'[^']*'|none)"
    r".*?but current is (?:the value )?(?P<existing>'[^']*'|none)"
)


def describe_difference(declared: Queue | Exchange, error_text: str) -> str:
    """One sentence for the operator: what exists, what was asked for, and that it is used as it is."""
    entity_type = "exchange" if isinstance(declared, Exchange) else "queue"
    match = re.search(_INEQUIVALENT, error_text)
    if match is None:
        return (
            f"{entity_type} {declared.name!r} exists and differs from what was asked for ({error_text}); used as found"
        )
    existing_value, declared_value = (_value(match[group]) for group in ("existing", "declared"))
    return (
        f"{entity_type} {declared.name!r} exists with {match['argument']} {existing_value} where {declared_value} was asked for; "
        f"used as found. To end this warning, ask for the same in task_queues, or delete the {entity_type} once it is empty"
    )


def first_difference(error_text: str) -> str | None:
    """The difference in the broker's text, short: `x-queue-type is 'classic', wanted 'quorum'`; None for other texts."""
    match = re.search(_INEQUIVALENT, error_text)
    if match is None:
        return None
    return f"{match['argument']} is {_value(match['existing'])}, wanted {_value(match['declared'])}"


def _value(text: str) -> str:
    return "not set" if text == "none" else text


# -- The shards of a queue whose tasks share it fairly (`fair_by`): queues beside it, `<queue>.fair.<number>`.
#
# All calls with the same key go to the same shard, and workers that consume the queue consume its shards, which take turns. Dead
# letters, slots, pools and pauses are those of the queue.

_SHARD = re.compile(r"(.+)\.fair\.\d+", re.DOTALL)


@lru_cache(4096)
def base_of(queue: str) -> str:
    """The name of the queue that a shard belongs to; of any other queue its own name."""
    match = _SHARD.fullmatch(queue)
    return queue if match is None else match[1]


def shard_name(queue: str, number: int) -> str:
    """The name of one of a queue's shards."""
    return f"{queue}.fair.{number}"


def shard_of(queue: Queue, name: str) -> Queue:
    """A shard: a queue with the same arguments, reached by its name alone."""
    return replace(queue, name=name, exchange=None, routing_key="", bindings=())


def has_shards(queue: Queue) -> bool:
    """Whether a queue can have shards: not one that is temporary or for all consumers, and no stream."""
    is_plain = queue.durable and not (queue.broadcast or queue.exclusive or queue.auto_delete or queue.passive)
    return is_plain and queue.argument_map.get("x-queue-type") != "stream"
