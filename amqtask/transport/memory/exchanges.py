"""Which queues an exchange routes a message to: direct, topic, fanout, headers, bindings to exchanges, alternates."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from amqtask.entities import Binding, Exchange

PREDECLARED = {
    f"amq.{name}": Exchange(f"amq.{name}", kind)
    for name, kind in (("direct", "direct"), ("topic", "topic"), ("fanout", "fanout"), ("headers", "headers"),
                       ("match", "headers"))
}  # fmt: skip


@lru_cache(maxsize=4096)
def matches_topic(pattern: str, routing_key: str) -> bool:
    """`*` is one word, `#` any number of words."""
    return _match_words(tuple(pattern.split(".")), tuple(routing_key.split(".")) if routing_key else ())


def _match_words(pattern: tuple[str, ...], words: tuple[str, ...]) -> bool:
    if not pattern:
        return not words
    if pattern[0] == "#":
        return any(_match_words(pattern[1:], words[skipped:]) for skipped in range(len(words) + 1))
    if pattern == ("",):
        return not words
    return bool(words) and pattern[0] in ("*", words[0]) and _match_words(pattern[1:], words[1:])


def matches_headers(asked: Mapping[str, Any], headers: Mapping[str, Any]) -> bool:
    """`x-match`: all (default), any, all-with-x, any-with-x; an argument without a value asks for presence."""
    mode = str(asked.get("x-match", "all"))
    with_x = mode.endswith("-with-x")
    wanted = {name: value for name, value in asked.items() if name != "x-match" and (with_x or name[:2] != "x-")}
    hits = [name in headers and (value is None or headers[name] == value) for name, value in wanted.items()]
    return any(hits) if mode.startswith("any") else all(hits)


def is_match(exchange: Exchange, binding: Binding, routing_key: str, headers: Mapping[str, Any]) -> bool:
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
