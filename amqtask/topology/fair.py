"""The shards of a queue whose tasks share it fairly (`fair_by`): queues beside it, `<queue>.fair.<number>`.

All calls with the same key go to the same shard, and workers that consume the queue consume its shards, which take turns. Dead
letters, slots, pools and pauses are those of the queue.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from amqtask.protocol.entities import Queue

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
