"""What goes to Redis and comes from it, without a server: RESP, envelopes, keys, declarations."""

from __future__ import annotations

import itertools
import json
from decimal import Decimal
from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from amqtask import AmqTask
from amqtask.exceptions import ConfigurationError, PublishError
from amqtask.protocol.entities import Binding, Exchange, Queue
from amqtask.protocol.message import Message, Properties
from amqtask.topology.delays import DelayPlan
from amqtask.transport.redis.answers import Consumed, Held, dead_letter
from amqtask.transport.redis.layout import Layout, incoming, list_keys, outgoing, step_of
from amqtask.transport.redis.publishing import Batch, Declared
from amqtask.transport.redis.wire import Parser, Push, ReplyError, command, owner_in

REPLIES = (
    b"+OK\r\n:12\r\n$3\r\na\r\n\r\n$-1\r\n_\r\n*2\r\n$1\r\nx\r\n*0\r\n-OOM too much\r\n"
    b">2\r\n$10\r\ninvalidate\r\n*1\r\n$1\r\nq\r\n%1\r\n$1\r\nk\r\n#t\r\n,1.5\r\n"
)
EXPECTED = [b"OK", 12, b"a\r\n", None, None, [b"x", []], "OOM", Push([b"invalidate", [b"q"]]), [b"k", True], 1.5]


@given(st.lists(st.integers(1, len(REPLIES) - 1), max_size=8))
def test_replies_are_read_wherever_the_bytes_are_cut(cuts: list[int]) -> None:
    parser, found = Parser(), list[Any]()
    edges = [0, *sorted(set(cuts)), len(REPLIES)]
    for start, end in itertools.pairwise(edges):
        found += parser.feed(REPLIES[start:end])

    assert [reply.code if isinstance(reply, ReplyError) else reply for reply in found] == EXPECTED


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("OOM command not allowed when used memory > 'maxmemory'. script: ab, on @user_script:1.", "OOM"),
        ("ERR Error running script (call to f_ab): @user_script:12: -OOM command not allowed", "OOM"),
        ("ERR Error running script (call to f_ab): @user_script:12: no such thing", "ERR"),
        ("ERR The user executing the script can't run this command or subcommand script: ab", "NOPERM"),
        ("NOPERM ACL failure in script: User app has no permissions", "NOPERM"),
    ],
)
def test_what_a_script_trips_over_has_a_code_in_every_version(text: str, code: str) -> None:
    assert ReplyError(text).code == code


def test_bytes_that_are_no_reply_are_an_error() -> None:
    with pytest.raises(ValueError, match="not a reply"):
        list(Parser().feed(b"HTTP/1.1 400\r\n"))


def test_a_command_is_an_array_of_strings() -> None:
    assert command("SET", "ä", 1, b"\x00") == b"*4\r\n$3\r\nSET\r\n$2\r\n\xc3\xa4\r\n$1\r\n1\r\n$1\r\n\x00\r\n"


@pytest.mark.parametrize(("priority", "step"), [(None, 0), (0, 0), (2, 0), (3, 3), (8, 6), (9, 9), (255, 9), (-1, 0)])
def test_priorities_have_celerys_steps(priority: int | None, step: int) -> None:
    assert step_of(priority) == step


def test_a_queues_lists_have_kombus_names() -> None:
    assert list_keys("app:", "q") == ["app:q", "app:q\x06\x163", "app:q\x06\x166", "app:q\x06\x169"]


@given(body=st.binary(max_size=50), correlation_id=st.text(max_size=20, alphabet=st.characters(codec="utf-8")))
def test_a_message_comes_back_as_it_went(body: bytes, correlation_id: str) -> None:
    properties = Properties(
        content_type="application/json",
        headers={"n": [1, None]},
        correlation_id=correlation_id,
        reply_to="me",
        priority=4,
    )

    found = incoming(outgoing(Message(body, properties, "x", "key")).envelope)

    assert (found.body, found.exchange, found.routing_key, found.redelivered) == (body, "x", "key", False)
    assert found.properties == properties


def test_a_delayed_message_leaves_without_what_rabbitmq_needs_for_it() -> None:
    queue = Queue("q")
    plain = Message(b"1", Properties(headers={"id": "a"}, priority=6), "", "q", (queue,))

    leaving = outgoing(DelayPlan().delayed(plain, 60, now=1000.0))

    assert (leaving.due, leaving.exchange, leaving.routing_key, leaving.step) == (1_060_000, "", "q", 6)
    assert leaving.message.declare == (queue,)
    assert json.loads(leaving.envelope)["headers"] == {"id": "a"}


def test_what_celery_restored_counts_as_redelivered() -> None:
    document = json.loads(outgoing(Message(b"1", Properties(), "", "q")).envelope)
    document["properties"]["delivery_info"]["redelivered"] = True

    assert incoming(json.dumps(document).encode()).redelivered


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b"\xff", b'{"properties": [], "body": ""}', b'{"body": 1}'])
def test_what_is_no_envelope_is_a_message_that_says_so(text: bytes) -> None:
    found = incoming(text)

    assert found.body == text
    assert "envelope" in found.properties.headers.problem  # type: ignore[attr-defined]


JSON_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
FIELDS = ["correlation_id", "reply_to", "priority", "delivery_info", "timestamp", "expiration", "body_encoding", "type"]


@given(st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES), JSON_VALUES, JSON_VALUES)
def test_whatever_an_envelope_holds_its_properties_have_their_types(fields: Any, headers: Any, body: Any) -> None:
    text = json.dumps({"body": body, "headers": headers, "properties": fields, "content-type": headers}).encode()

    found = incoming(text)

    assert isinstance(found.body, bytes)
    assert isinstance(found.properties.headers, dict)
    for name in ("correlation_id", "reply_to", "expiration", "type", "content_type"):
        assert isinstance(getattr(found.properties, name), (str, type(None)))
    assert isinstance(found.properties.priority, (int, type(None)))


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("NaN", "nan"),
        ("-Infinity", "-inf"),
        ('"\\ud800"', repr("\ud800")),
        ("1234567890123456789012345678901234567890", "1234567890123456789012345678901234567890"),
        ('{"__type__": "decimal", "__value__": "1.50"}', repr(Decimal("1.50"))),
    ],
)
def test_headers_may_have_what_pythons_json_alone_writes(written: str, read: str) -> None:
    text = f'{{"body": "1", "properties": {{}}, "headers": {{"value": {written}}}}}'

    found = incoming(text.encode())

    assert (found.body, repr(found.properties.headers["value"])) == (b"1", read)


def test_headers_that_are_too_large_are_refused_alone() -> None:
    document = json.loads(outgoing(Message(b"1", Properties(), "", "q")).envelope)
    document["headers"] = {"large": "x" * 100_000}

    found = incoming(json.dumps(document).encode())

    assert found.body == b"1"
    assert "bytes" in found.properties.headers.problem  # type: ignore[attr-defined]


def test_bindings_are_those_of_kombu() -> None:
    layout = Layout()

    def members(binding: Binding) -> set[str]:
        return {str(words[2]) for words, _ in layout.declaring(binding, lambda text: None)}

    assert members(Binding(Exchange("x"), "q", "key")) == {"key\x06\x16\x06\x16q"}
    assert members(Binding(Exchange("x", "topic"), "q", "a-b.*.#")) == {
        "a-b.*.#\x06\x16^a\\-b\\.[^\\.]+\\..*?$\x06\x16q"
    }


def test_events_go_through_a_channel_as_celerys_do() -> None:
    queue = Queue("celeryev.me", exchange=Exchange("celeryev", "topic"), routing_key="task.#")

    assert Layout(db=3).pattern(queue) == "/3.celeryev/task.*"


def test_headers_exchanges_are_refused() -> None:
    with pytest.raises(PublishError, match="topic exchange"):
        list(Layout().declaring(Exchange("x", "headers"), lambda text: None))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"broker_url": ["redis://a", "redis://b"]}, "one URL"),
        ({"broker_url": "redis://a", "broker_transport_options": {"lease": "30"}}, "3 to 86400"),
        ({"broker_url": "redis://a", "broker_transport_options": {"lease": 1}}, "3 to 86400"),
        ({"broker_url": "sentinel://a"}, "broker_transport_options"),
        ({"broker_url": "redis://a", "result_backend": "rpc://"}, "the broker's URL"),
    ],
)
def test_what_cannot_be_is_said_with_what_to_do(settings: dict[str, Any], words: str) -> None:
    app = AmqTask("refused", set_as_current=False, **settings)

    with pytest.raises(ConfigurationError, match=words):
        app.send_task("a.b")


@pytest.mark.parametrize(
    "url", ["redis+cluster://me:secret@a:1;redis+cluster://b:2", "valkey+cluster://me:secret@a:1;b:2"]
)
def test_a_cluster_is_named_by_some_nodes(url: str) -> None:
    app = AmqTask("cluster", broker=url, set_as_current=False)

    assert app.broker_name == "cluster redis://a:1, redis://b:2"
    assert app.broker.chords_url is not None
    assert app.broker.chords_url.startswith("redis+cluster://")


@pytest.mark.parametrize("use_ssl", [True, {"ssl_ca_certs": None}])
@pytest.mark.parametrize("url", ["redis://h/0", "sentinel://h/0", "redis+cluster://h", "valkey://h"])
def test_use_ssl_means_tls_whatever_the_url(url: str, use_ssl: object) -> None:
    app = AmqTask(
        "tls",
        broker=url,
        broker_use_ssl=use_ssl,
        broker_transport_options={"master_name": "shop"},
        set_as_current=False,
    )

    assert app.broker.info()["ssl"] is True


def test_the_master_of_a_slot_stands_in_a_nodes_answer() -> None:
    slots = [[0, 5460, [b"", 7000, b"id"], [b"10.0.0.2", 7003, b"id"]], [5461, 16383, [b"10.0.0.3", 7001, b"id", []]]]

    assert owner_in(slots, 5460, "asked") == (
        ("asked", 7000),
        [("asked", 7000), ("10.0.0.2", 7003), ("10.0.0.3", 7001)],
    )
    assert owner_in(slots, 5461, "asked")[0] == ("10.0.0.3", 7001)
    assert owner_in(slots[:1], 9000, "asked")[0] is None


@pytest.mark.parametrize("key", [5, None, ["q"], "a\x06\x16b"])
def test_a_routing_key_that_cannot_be_one_is_refused(key: Any) -> None:
    with pytest.raises(PublishError, match="name"):
        outgoing(Message(b"", Properties(), "", key))


def test_a_message_leaves_once_however_often_redis_could_not_be_reached_before() -> None:
    messages = [Message(b"%d" % number, Properties(), "", "q") for number in range(2)]
    batch = Batch(messages, Declared(Layout(), lambda text: None), float("inf"), "redis")
    batch.commands()
    for _ in range(5):
        batch.failed(redis.ConnectionError("refused"))

    assert [words[0] for words in batch.commands()] == ["SCRIPT", "SCRIPT", "EVALSHA", "EVALSHA"]
    batch.take([b"", b"", 1, 1])
    assert batch.is_done
    assert batch.errors == [None, None]


def test_a_long_reply_is_read_as_it_comes() -> None:
    parser, reply = Parser(), b"*2\r\n$10000000\r\n" + b"x" * 10_000_000 + b"\r\n:1\r\n"
    found = [each for at in range(0, len(reply), 1000) for each in parser.feed(reply[at : at + 1000])]

    assert found == [[b"x" * 10_000_000, 1]]
    assert list(parser.feed(b":2\r\n")) == [2]


def test_urls_are_shown_without_passwords() -> None:
    app = AmqTask("safe", broker="redis://me:secret@host:6380/2", set_as_current=False)

    assert app.broker_name == "redis://host:6380/2"
    assert app.broker.info()["hostname"] == "host"
    assert "secret" not in str(app.broker.info())


ODD_DEATHS: list[Any] = [
    5, "abc", [1], [{}], {"queue": "q"}, [{"queue": "q", "reason": "rejected"}],
    [{"queue": "q", "reason": "rejected", "count": "many"}],
]  # fmt: skip


@pytest.mark.parametrize("deaths", ODD_DEATHS, ids=range(len(ODD_DEATHS)))
def test_a_message_with_odd_deaths_is_buried_like_any_other(deaths: Any) -> None:
    queue = Queue("q", queue_arguments={"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "q.dead"})
    message = incoming(outgoing(Message(b"1", Properties(headers={"x-death": deaths}), "", "q")).envelope)

    letter = dead_letter(Held(Consumed(queue, (), 1, None), message, 0, 1), "rejected")

    assert letter is not None
    newest = json.loads(letter.envelope)["headers"]["x-death"][0]
    assert (letter.routing_key, newest["queue"], newest["reason"], newest["count"]) == ("q.dead", "q", "rejected", 1)


@pytest.mark.parametrize("note", [b"\xff{", b"null", b"[1]", b"5", b"[" * 100_000, b'{"x-max-length": {}}', b"{}"])
def test_what_others_note_of_a_queue_is_a_difference_that_is_told(note: bytes) -> None:
    told: list[str] = []
    (_, on_reply), *_ = reversed(list(Layout("").declaring(Queue("q", arguments=(("x-max-length", 5),)), told.append)))

    on_reply(note)

    assert [text.startswith("queue 'q' exists with") for text in told] == [True]
