"""Bounds of one message: its follow-ups must have the form of signatures, and there must not be too many.

Only follow-ups that are published when this message has run count: the next step of a chain, the members of a group. Later ones
are checked in their own messages.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from amqtask.exceptions import InvalidTaskError
from amqtask.ground.printable import described
from amqtask.protocol.chord import size_of
from amqtask.protocol.task import saferepr

if TYPE_CHECKING:
    from amqtask.ground.shapes import JsonFields, Keywords

FOLLOW_UPS, NEW_QUEUES = 100_000, 10
_COMPOSITIONS = frozenset({"celery.chain", "celery.group", "celery.chord"})


class Bounds(NamedTuple):
    """`known_queues` count as existing: those of the configuration, and those that were used before."""

    follow_ups: int = FOLLOW_UPS
    new_queues: int = NEW_QUEUES
    known_queues: Container[str] = frozenset()

    def check(self, embed: JsonFields) -> None:
        """Raises: InvalidTaskError for the third element of a body with too many follow-ups, or with one that is no signature."""
        if not any(embed.values()):
            return
        signatures = [*_listed(embed, "callbacks"), *_listed(embed, "errbacks"), *_listed(embed, "chain")[-1:]]
        chord = embed.get("chord")
        if chord:
            signatures.append(chord)
            if isinstance(chord, Mapping):
                size_of(chord)
        if signatures:
            self._count(signatures)

    def _count(self, signatures: list[object]) -> None:
        queues = set()
        for count, call in enumerate(_published(signatures), 1):
            if count > self.follow_ups:
                raise InvalidTaskError(
                    f"the message asks for more than {self.follow_ups} follow-ups (worker_max_follow_ups)"
                )
            queue = call.get("queue")
            if isinstance(queue, str) and queue not in self.known_queues:
                queues.add(queue)
                if len(queues) > self.new_queues:
                    raise InvalidTaskError(
                        f"the follow-ups of the message name more than {self.new_queues} queues that this worker does not "
                        "know (worker_max_new_queues); task_queues makes them known"
                    )


DEFAULT = Bounds()


def _listed(embed: JsonFields, name: str) -> list[object]:
    signatures = embed.get(name)
    if not signatures:
        return []
    if isinstance(signatures, Mapping):
        return [signatures]
    if not isinstance(signatures, (list, tuple)):
        raise InvalidTaskError(f"`{name}` of the message is {described(signatures)}, not a list of signatures")
    return list(signatures)


def _published(signatures: list[object]) -> Iterator[Mapping[str, object]]:
    """The options of each call that is published for these signatures."""
    while signatures:
        sig = signatures.pop()
        if not isinstance(sig, Mapping) or not isinstance(sig.get("task"), str):
            raise InvalidTaskError(f"a follow-up of the message is not a signature: {saferepr(sig, 100)}")
        kwargs, options = sig.get("kwargs") or {}, sig.get("options") or {}
        if not isinstance(kwargs, Mapping) or not isinstance(options, Mapping):
            raise InvalidTaskError(
                f"a follow-up of the message has no mapping as kwargs or options: {saferepr(sig, 100)}"
            )
        if sig["task"] in _COMPOSITIONS:
            signatures += _members(sig["task"], kwargs)
        else:
            yield options


def _members(task: str, kwargs: Keywords) -> list[object]:
    tasks = kwargs.get("header" if task == "celery.chord" else "tasks") or []
    if isinstance(tasks, Mapping):  # a header that is a group, or one task
        return [tasks]
    if not isinstance(tasks, (list, tuple)):
        raise InvalidTaskError(f"the tasks of a {task} are {described(tasks)}, not a list")
    return list(tasks[:1] if task == "celery.chain" else tasks)
