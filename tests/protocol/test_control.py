"""Commands and replies: who is meant, and both ways over the wire."""

from __future__ import annotations

import json
from typing import Any

import pytest

from amqtask.exceptions import Undecodable
from amqtask.protocol.control import (
    Command,
    check_pattern,
    command_message,
    mailbox,
    read_command,
    read_reply,
    reply_message,
    reply_queue,
)
from amqtask.protocol.message import Message
from amqtask.protocol.serialization import content_types

JSON = content_types(["json"])


def over_the_wire(message: Message) -> tuple[bytes, str | None, str | None, dict[str, object], frozenset[str]]:
    properties = message.properties
    return message.body, properties.content_type, properties.content_encoding, properties.headers, JSON


@pytest.mark.parametrize(
    ("command", "is_meant"),
    [
        (Command("ping"), True),
        (Command("ping", destination=("a@host",)), True),
        (Command("ping", destination=("b@host",)), False),
        (Command("ping", destination=()), False),
        (Command("ping", pattern="a@*", matcher="glob"), True),
        (Command("ping", pattern="b@*", matcher="glob"), False),
        (Command("ping", pattern="[ab]@h.*", matcher="pcre"), True),
        (Command("ping", destination=("b@host",), pattern="a@*", matcher="glob"), False),
    ],
)
def test_a_command_is_for_those_it_names(command: Command, is_meant: bool) -> None:
    assert command.is_for("a@host") is is_meant


def test_a_command_survives_the_wire() -> None:
    command = Command(
        "rate_limit",
        {"task_name": "t", "rate_limit": "1/s"},
        destination=("a@host",),
        ticket="t-1",
        reply_exchange="reply.celery.pidbox",
        reply_key="oid",
        expires=12.5,
    )

    assert read_command(*over_the_wire(command_message(command))) == command


def test_a_reply_goes_where_the_command_said() -> None:
    command = Command("ping", ticket="t-1", reply_exchange="reply.celery.pidbox", reply_key="oid")

    reply = reply_message(command, "a@host", {"ok": "pong"})

    assert (reply.exchange, reply.routing_key) == ("reply.celery.pidbox", "oid")
    assert read_reply(*over_the_wire(reply)) == ("a@host", {"ok": "pong"}, "t-1")


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b"{}",
        b'{"method": 1}',
        b'{"method": "ping", "arguments": [1]}',
        b'{"method": "ping", "reply_to": "me"}',
        b'{"method": "ping", "destination": 5}',
        b'{"method": "ping", "pattern": "(", "matcher": "pcre"}',
    ],
)
def test_other_bodies_are_no_commands(body: bytes) -> None:
    with pytest.raises(Undecodable):
        read_command(body, "application/json", "utf-8", {}, JSON)


@pytest.mark.parametrize(
    "fields",
    [
        {"pattern": 5},
        {"pattern": ["a"]},
        {"pattern": "a", "matcher": 5},
        {"pattern": "x" * 1000, "matcher": "glob"},
        {"pattern": "(", "matcher": "pcre"},
        {"pattern": "(" * 150, "matcher": "pcre"},
        {"pattern": "(a+)+(a+)+(a+)+(a+)+(a+)+b", "matcher": "pcre"},
        {"pattern": "(a|a)*b", "matcher": "pcre"},
        {"pattern": "(?=(a+)+b)", "matcher": "pcre"},
        {"pattern": ".*.*.*.*.*.*.*b", "matcher": "pcre"},
        {"pattern": "a?" * 60 + "a" * 60, "matcher": "pcre"},
        {"pattern": ".*($){4000000000}", "matcher": "pcre"},
        {"pattern": "((($){100}){100}){100}", "matcher": "pcre"},
        {"pattern": "(?<=w*)1", "matcher": "pcre"},
        {"destination": 5},
        {"destination": [5]},
        {"destination": {"w@h": 1}},
        {"arguments": 5},
        {"arguments": [1]},
        {"ticket": ["t"]},
        {"reply_to": "q"},
        {"reply_to": {"exchange": 5}},
        {"reply_to": {"routing_key": ["k"]}},
    ],
)
def test_a_malformed_command_is_undecodable(fields: dict[str, Any]) -> None:
    body = json.dumps({"method": "ping", "arguments": {}, **fields}).encode()

    with pytest.raises(Undecodable, match="malformed"):
        read_command(body, "application/json", "utf-8", {}, JSON)


@pytest.mark.parametrize("expires", ["soon", [1], 10**400])
def test_headers_of_a_command_that_make_no_sense_are_undecodable(expires: Any) -> None:
    with pytest.raises(Undecodable, match="malformed"):
        read_command(b'{"method": "ping"}', "application/json", "utf-8", {"expires": expires}, JSON)


@pytest.mark.parametrize(
    "pattern", [r"w\d+@.*", r"(web|mail)-\d+@h", r"^w.@h$", r"[a-z]+@(h|host)(\.example)?", "(?i)W1@H"]
)
def test_simple_regular_expressions_are_tried(pattern: str) -> None:
    check_pattern(pattern, "pcre")


def test_mailboxes_have_celerys_names_and_flags() -> None:
    box, replies = mailbox("a@host"), reply_queue("oid")

    assert box.name == "a@host.celery.pidbox"
    assert box.exchange is not None
    assert (box.exchange.name, box.exchange.type, box.exchange.durable) == ("celery.pidbox", "fanout", False)
    assert (box.exclusive, box.auto_delete, box.durable) == (True, True, False)
    assert box.argument_map == {"x-expires": 10_000, "x-message-ttl": 300_000}
    assert (replies.name, replies.routing_key) == ("oid.reply.celery.pidbox", "oid")
