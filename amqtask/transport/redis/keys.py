"""The keys in Redis: kombu's (kombu/transport/redis.py) and ours. All begin with `global_keyprefix`, where that is set.

`<queue>`, `<queue>\\x06\\x163` …  lists, one for each priority step; pushed left, popped right; a lower number goes first
`_kombu.binding.<exchange>`        set: routing key, pattern (topic exchanges only) and queue, joined by \\x06\\x16
`_kombu.binding_permanent.<…>`     the same members, where kombu's sweep may not take them
`unacked`, `unacked_index`         what consumers hold: tag -> [message, exchange, routing key]; tag by time (seconds)
`amqtask.lease`                    tags of ours by the time at which their consumer must have renewed them (seconds)
`amqtask.held`                     tag -> queue and step that it came from
`amqtask.tries`                    hash of a message -> how often its delivery failed; there at all: it is redelivered
`amqtask.queues`                   queue -> its arguments, as it was declared first
`amqtask.limits`                   queue -> x-max-length, where such a queue refuses more
`amqtask.exchanges`                exchange -> its type
`amqtask.delay`, `amqtask.delayed` id by due time (milliseconds); id -> exchange, routing key, step and message
`amqtask.active.<queue>`           which consumer has an exclusive or single-active-consumer queue, for as long as it renews that
"""

from __future__ import annotations

SEPARATOR = "\x06\x16"
STEPS = (0, 3, 6, 9)


def step_of(priority: object) -> int:
    """The priority step of a message: the largest that is not above its priority; 0 without one."""
    number = priority if isinstance(priority, int) and not isinstance(priority, bool) else 0
    return max(step for step in STEPS if step <= max(0, number))


def list_keys(prefix: str, queue: str) -> list[str]:
    """The lists of a queue, in the order in which they are served."""
    return [f"{prefix}{queue}{SEPARATOR}{step}" if step else f"{prefix}{queue}" for step in STEPS]
