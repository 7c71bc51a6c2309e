"""Which queues an exchange routes a message to: direct, topic, fanout, headers, bindings to exchanges, alternates."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from amqtask.protocol.entities import Binding, Exchange

if TYPE_CHECKING:
    from amqtask.ground.shapes import Headers, QueueArguments

PREDECLARED = {
    f"amq.{name}": Exchange(f"amq.{name}", exchange_type)
    for name, exchange_type in (("direct", "direct"), ("topic", "topic"), ("fanout", "fanout"), ("headers", "headers"),
                       ("match", "headers"))
}  # fmt: skip


@lru_cache(maxsize=4096)
def matches_topic(pattern: str, routing_key: str) -> bool:
    """`*` is one word, `#` any number of words."""
    return _match_words(tuple(pattern.split(".")), tuple(routing_key.split(".")) if routing_key else ())


def _match_words(pattern: tuple[str, ...], key_words: tuple[str, ...]) -> bool:
    if not pattern:
        return not key_words
    if pattern[0] == "#":
        return any(_match_words(pattern[1:], key_words[skipped:]) for skipped in range(len(key_words) + 1))
    if pattern == ("",):
        return not key_words
    return bool(key_words) and pattern[0] in ("*", key_words[0]) and _match_words(pattern[1:], key_words[1:])


def matches_headers(arguments: QueueArguments, headers: Headers) -> bool:
    """`x-match`: all (default), any, all-with-x, any-with-x; an argument without a value asks for presence."""
    mode = str(arguments.get("x-match", "all"))
    with_x = mode.endswith("-with-x")
    required = {name: value for name, value in arguments.items() if name != "x-match" and (with_x or name[:2] != "x-")}
    hits = [name in headers and (value is None or headers[name] == value) for name, value in required.items()]
    return any(hits) if mode.startswith("any") else all(hits)


def is_match(exchange: Exchange, binding: Binding, routing_key: str, headers: Headers) -> bool:
    """Whether a binding of this exchange takes the message."""
    match exchange.type:
        case "fanout":
            return True
        case "topic":
            return matches_topic(binding.routing_key, routing_key)
        case "headers":
            return matches_headers(dict(binding.arguments), headers)
        case _:
            return binding.routing_key == routing_key
