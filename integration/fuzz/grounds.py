"""Where a run's messages go, and how they are looked at: RabbitMQ, or Redis, where anybody can write any text into a queue."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import redis

from amqtask.transport.redis.layout import SEPARATOR, incoming, list_keys
from integration.fuzz import values
from integration.fuzz.amqp import Field, Pairs, RawConnection, RawMessage
from integration.fuzz.chance import Chance
from integration.nodes import RabbitNode
from integration.servers import RedisServer

if TYPE_CHECKING:
    from typing_extensions import Self

_NAME = re.compile(r'"connection_name","([^"]*)"')
_TAG = re.compile(rb"fz-\d+")


class Connection(Protocol):
    """To write hostile messages, and to look into queues."""

    def publish(self, messages: Sequence[RawMessage]) -> None: ...

    def ready(self, queue: str) -> int: ...

    def drain(self, queue: str) -> Iterator[tuple[dict[str, bytes], bytes]]: ...

    def declare(self, queue: str, arguments: Mapping[str, Any] | None = None) -> None: ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Ground(Protocol):
    """One run's broker. `backend` is the result store of its applications."""

    url: str
    backend: str
    has_reply_queues: bool

    def connect(self) -> Connection: ...

    def counts(self) -> dict[str, int]:
        """How many messages each queue has, those that a worker holds included."""

    def connections(self, node: str) -> set[str]:
        """Those of that worker."""

    def remove(self) -> None: ...


class RabbitGround:
    """A virtual host."""

    backend = "rpc://"
    has_reply_queues = True

    def __init__(self, node: RabbitNode, name: str) -> None:
        self._node = node
        self._vhost = name
        self.url = node.add_vhost(name)

    def connect(self) -> Connection:
        return RawConnection(self.url)

    def counts(self) -> dict[str, int]:
        lines = self._node.ctl("list_queues", "-p", self._vhost, "messages", "name").splitlines()
        found = (line.partition("\t") for line in lines)
        return {name: int(count) for count, _, name in found if count.isdigit()}

    def connections(self, node: str) -> set[str]:
        lines = self._node.ctl("list_connections", "vhost", "pid", "client_properties").splitlines()
        found = (line.split("\t") for line in lines)
        names = {pid: _NAME.search(told) for vhost, pid, told in found if vhost == self._vhost}
        return {f"{pid} {name[1]}" for pid, name in names.items() if name and name[1].startswith(node)}

    def remove(self) -> None:
        with suppress(Exception):
            self._node.ctl("delete_vhost", self._vhost)


class RedisGround:
    """A server of its own."""

    has_reply_queues = False

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._server = RedisServer()
        self.url = self.backend = self._server.start().url
        self._client: Any = redis.Redis.from_url(self.url)

    def connect(self) -> Connection:
        return RedisConnection(self.url, self._seed)

    def counts(self) -> dict[str, int]:
        found = {name.decode(): self._size(name.decode()) for name in self._client.hkeys("amqtask.queues")}
        for entry in self._client.hvals("unacked"):
            with suppress(ValueError):
                queue = str(json.loads(entry[entry.rindex(b',"",') + 4 : -1]))
                found[queue] = found.get(queue, 0) + 1
        return {**found, "amqtask.delay.set": self._client.zcard("amqtask.delay")}

    def _size(self, queue: str) -> int:
        return sum(self._client.llen(key) for key in list_keys("", queue))

    def connections(self, node: str) -> set[str]:
        return {f"{each['id']} {each['name']}" for each in self._client.client_list() if each["name"].startswith(node)}

    def remove(self) -> None:
        self._client.close()
        self._server.remove()


class RedisConnection:
    """Writes kombu's envelopes, a part of them wrong, into the lists and channels to which AMQP's messages would go."""

    def __init__(self, url: str, seed: int) -> None:
        self._client: Any = redis.Redis.from_url(url)
        self._seed = seed

    def publish(self, messages: Sequence[RawMessage]) -> None:
        pipeline = self._client.pipeline(transaction=False)
        for message in messages:
            text = envelope(message, self._seed)
            if message.exchange == "celery.pidbox":
                pipeline.publish("/0.celery.pidbox", text)
            elif message.exchange.startswith("amqtask.delay"):
                tag = _text(message.properties.get("message_id", ""))
                start = SEPARATOR.join(("", message.routing_key, "0", "")).encode()
                pipeline.hset("amqtask.delayed", tag, start + text)
                pipeline.zadd("amqtask.delay", {tag: 4_000_000_000_000})
            else:
                pipeline.lpush(message.routing_key or "nobody", text)
        pipeline.execute()

    def ready(self, queue: str) -> int:
        return sum(self._client.llen(key) for key in list_keys("", queue))

    def drain(self, queue: str) -> Iterator[tuple[dict[str, bytes], bytes]]:
        if queue.startswith("amqtask.delay"):
            entries: list[bytes] = self._client.hvals("amqtask.delayed")
            texts = [entry.split(SEPARATOR.encode(), 3)[-1] for entry in entries]
        else:
            texts = [text for key in list_keys("", queue) for text in self._client.lrange(key, 0, -1)]
        for message in map(incoming, texts):
            tag = message.properties.message_id or ""
            if not re.fullmatch("(?:fz|good)-[0-9]+", tag):
                # What was no envelope is the body of its dead letter.
                found = _TAG.findall(message.body)
                tag = found[-1].decode() if found else ""
            yield {"message_id": tag.encode(), "headers": repr(message.properties.headers).encode()}, b""

    def declare(self, queue: str, arguments: Mapping[str, Any] | None = None) -> None:
        """A list is there when it is written to."""

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# -- envelopes

# Fields of AMQP's properties that kombu's envelope has elsewhere.
_ELSEWHERE = ("content_type", "content_encoding", "headers")
_DEEP = "[" * 300 + "]" * 300


def envelope(message: RawMessage, seed: int) -> bytes:
    """The message in kombu's envelope; for a hostile one, in one case of three, with one to three things wrong about that."""
    properties = message.properties
    tag = _text(properties.get("message_id", ""))
    fields = {name: value for name, value in properties.items() if name not in _ELSEWHERE}
    fields |= {
        "delivery_info": {"exchange": message.exchange, "routing_key": message.routing_key},
        "body_encoding": "base64",
        "delivery_tag": f"tag-{tag}",
    }
    document = {
        "body": b64encode(message.body).decode(),
        "content-encoding": properties.get("content_encoding"),
        "content-type": properties.get("content_type"),
        "headers": properties.get("headers", {}),
        "properties": fields,
    }
    if not tag.startswith("fz-"):
        return _json(document).encode("utf-8", "surrogatepass")
    chance = Chance(seed, int(tag[3:]) + 1_000_000)
    if not chance.one_in(3):
        return _json(document).encode("utf-8", "surrogatepass")
    for _ in range(chance.randint(1, 3)):
        _spoil(document, fields, chance)
    text = _json(document).encode("utf-8", "surrogatepass")
    return chance.choice(WHOLE)(text, tag.encode(), chance) if chance.one_in(3) else text


def _spoil(document: dict[str, Any], fields: dict[str, Any], chance: Chance) -> None:
    """One thing wrong; its message_id stays readable."""
    match chance.choice(
        ("part", "no part", "field", "field", "no field", "body", "encoding", "tag", "address", "more")
    ):
        case "part":
            document[chance.choice(("content-type", "content-encoding", "headers"))] = chance.json()
        case "no part":
            document.pop(chance.choice(("content-type", "content-encoding", "headers", "body")), None)
        case "field":
            fields[chance.choice(_FIELDS)] = chance.json()
        case "no field":
            fields.pop(chance.choice(_FIELDS), None)
        case "body":
            document["body"] = chance.choice(("%%%", "W10", "W10=\n", "é", 5, None, [], {"a": 1}, chance.json()))
        case "encoding":
            fields["body_encoding"] = chance.choice(("rot13", "", None, 5, ["base64"], "BASE64"))
        case "tag":
            fields["delivery_tag"] = chance.choice(("the same", "", None, 5, [], chance.json()))
        case "address":
            names: tuple[Any, ...] = (
                "",
                "no such",
                "x" * 60_000,
                "a\x06\x16b",
                "\x00\x1b[2J",
                values.FORGED,
                "\ud800",
                5,
                None,
                [],
                {},
            )
            fields["delivery_info"] = chance.choice(
                ({"exchange": chance.choice(names), "routing_key": chance.choice(names)}, [], "x", None, chance.json())
            )
        case _:
            document[chance.choice(("redelivered", "x", "body_encoding"))] = chance.json()


_FIELDS = (
    "priority", "delivery_mode", "correlation_id", "reply_to", "expiration", "timestamp", "type", "app_id", "user_id",
    "delivery_tag", "body_encoding", "delivery_info", "cluster_id",
)  # fmt: skip
# What becomes of the whole text; it names its message somewhere.
WHOLE = (
    lambda text, tag, chance: text[: chance.randrange(len(text))] + tag,
    lambda text, tag, chance: text + b"," + tag,
    lambda text, tag, chance: b"[" + text + b"]",
    lambda text, tag, chance: b'"' + tag + b'"',
    lambda text, tag, chance: b"\xff\xfe" + text,
    lambda text, tag, chance: b"\xef\xbb\xbf" + text,
    lambda text, tag, chance: text.replace(b'"', b"'", chance.randint(1, 9)) + tag,
    lambda text, tag, chance: b"[" * 20_000 + tag,
    lambda text, tag, chance: b'{"properties":' * 20_000 + b'"' + tag,
    lambda text, tag, chance: text[:-1] + b',"body":"W10=","properties":{"message_id":"' + tag + b'"}}',
    lambda text, tag, chance: b'{"body":"W10=","properties":{"message_id":"' + tag + b'"},"properties":[]}',
    lambda text, tag, chance: b"\x00" + tag + text,
    lambda text, tag, chance: b'{"' + tag + b'": NaN}',
)


def _json(value: Any) -> str:
    """JSON of whatever AMQP's fields are, as one writes it who knows no rules."""
    match value:
        case Field(kind, payload):
            return _DEEP if kind in (b"A", b"F") else json.dumps(payload.decode("latin-1"))
        case Pairs():
            return "{" + ",".join(f"{json.dumps(_text(name))}:{_json(each)}" for name, each in value) + "}"
        case Mapping():
            return "{" + ",".join(f"{json.dumps(_text(name))}:{_json(each)}" for name, each in value.items()) + "}"
        case list() | tuple():
            return "[" + ",".join(map(_json, value)) + "]"
        case bytes():
            return json.dumps(value.decode("latin-1"))
        case int() if not isinstance(value, bool):
            return str(value) if abs(value) < 10**300 else "1" + "0" * 5_000
    return json.dumps(value)


def _text(name: object) -> str:
    return name.decode("latin-1") if isinstance(name, bytes) else str(name)
