"""Serializers: what goes in comes out, what is not trusted is not read, and errors say whose fault it is."""

from __future__ import annotations

import ast
import datetime as dt
import importlib
import pickle
import tracemalloc
import uuid
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amqtask import AmqTask
from amqtask.exceptions import ConfigurationError, ContentDisallowed, EncodeError, Undecodable
from amqtask.protocol import serialization
from amqtask.protocol.compression import compress, decompress
from amqtask.protocol.serialization import JSON, MSGPACK, PICKLE, YAML, content_types, dumps, loads
from amqtask.testing.worker import start_worker

ALL = content_types(["json", "yaml", "msgpack", "pickle"])

rich_leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.binary()
    | st.datetimes(timezones=st.none() | st.just(dt.timezone.utc))
    | st.dates()
    | st.times()
    | st.decimals(allow_nan=False)
    | st.uuids()
)
rich = st.recursive(
    rich_leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4)
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text("abcü ~:#'\"\n"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc"), inner, max_size=4),
)


def there_and_back(value: Any, serializer: str) -> Any:
    return loads(*dumps(value, serializer), ALL)


@given(rich)
def test_json_keeps_every_type_it_writes(value: Any) -> None:
    back = there_and_back(value, "json")

    assert back == value
    assert type(back) is type(value)


@given(rich)
def test_pickle_keeps_everything(value: Any) -> None:
    assert there_and_back(value, "pickle") == value


@pytest.mark.parametrize("serializer", ["yaml", "msgpack"])
@given(value=plain)
def test_the_others_keep_plain_values(serializer: str, value: Any) -> None:
    assert there_and_back(value, serializer) == value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (b"text", '{"__type__": "bytes", "__value__": "text"}'),
        (b"\xff", '{"__type__": "base64", "__value__": "/w=="}'),
        (uuid.UUID(int=1), '{"__type__": "uuid", "__value__": {"hex": "00000000000000000000000000000001"}}'),
        (Decimal("1.0"), '{"__type__": "decimal", "__value__": "1.0"}'),
        (dt.date(2026, 1, 2), '{"__type__": "date", "__value__": "2026-01-02"}'),
    ],
)
def test_json_writes_kombus_envelopes(value: Any, text: str) -> None:
    assert dumps(value, "json") == (text.encode(), "application/json", "utf-8")


def test_a_utc_time_written_with_z_is_read() -> None:
    body = b'{"__type__": "datetime", "__value__": "2026-01-02T03:04:05Z"}'

    assert loads(body, "application/json", "utf-8", ALL) == dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.timezone.utc)


def test_a_mapping_that_only_looks_like_an_envelope_stays_one() -> None:
    value = {"__type__": "bytes", "__value__": "x", "more": 1}

    assert there_and_back(value, "json") == value


def test_objects_say_themselves_how_they_are_written() -> None:
    class Money:
        def __json__(self) -> dict[str, int]:
            return {"cents": 5}

    assert dumps([Money()], "json").body == b'[{"cents": 5}]'


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"__type__": "nothing", "__value__": 1}', b"[" * 100_000])
def test_broken_json_is_undecodable(body: bytes) -> None:
    with pytest.raises(Undecodable, match="not valid application/json"):
        loads(body, "application/json", "utf-8", ALL)


@pytest.mark.parametrize("kind", ["application/x-yaml", "application/x-msgpack", "application/x-python-serialize"])
@given(body=st.binary(max_size=30))
def test_noise_is_a_value_or_undecodable(kind: str, body: bytes) -> None:
    try:
        loads(body, kind, None, ALL)
    except Undecodable:
        pass


def test_a_content_type_that_is_not_accepted_is_not_read() -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return pytest.fail, ("unpickled",)

    with pytest.raises(ContentDisallowed, match="x-python-serialize"):
        loads(pickle.dumps(Bomb()), "application/x-python-serialize", "binary", content_types(["json"]))


@pytest.mark.parametrize("brackets", [(b"[", b"]"), (b"{a: ", b"}")])
def test_yaml_has_a_depth(brackets: tuple[bytes, bytes]) -> None:
    begin, end = brackets
    assert loads(begin * 200 + end * 200, "application/x-yaml", "utf-8", ALL)
    with pytest.raises(Undecodable, match="within each other, more than 250"):
        loads(begin * 251 + end * 251, "application/x-yaml", "utf-8", ALL)


def test_aliases_of_yaml_are_read_as_long_as_they_stand_for_what_can_be_written_down() -> None:
    shared = [1, 2]
    assert loads(*dumps([shared, {"a": shared}], "yaml"), ALL) == [shared, {"a": shared}]

    bomb = "\n".join(["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10))])
    text = f"[&a {'x' * 100_000}, {', '.join(['*a'] * 2_000)}]"
    merged = "\n".join(["- &a0 {k: 1}", *(f"- &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 10))])
    for body in (bomb, text, merged, "&a [*a]", "&a {b: *a}"):
        with pytest.raises(Undecodable, match="aliases"):
            loads(body.encode(), "application/x-yaml", "utf-8", ALL)


def test_yaml_makes_no_objects() -> None:
    with pytest.raises(Undecodable):
        loads(b"!!python/object/apply:os.getpid []", "application/x-yaml", "utf-8", ALL)


@pytest.mark.parametrize("value", [{1, 2}, object(), [lambda: 1], {"a": {"b": object}}])
def test_what_json_cannot_say_is_an_encode_error(value: Any) -> None:
    with pytest.raises(EncodeError, match="json cannot write this"):
        dumps(value, "json")


def test_an_error_does_not_show_the_value() -> None:
    with pytest.raises(EncodeError) as caught:
        dumps({"password": "secret", "bad": {1}}, "json")

    assert "secret" not in str(caught.value)


def test_an_unknown_serializer_is_named_with_those_that_are_there() -> None:
    with pytest.raises(
        ConfigurationError, match="no serializer 'xml'; there are: auth, encrypted, json, msgpack, pickle, yaml"
    ):
        dumps(1, "xml")
    with pytest.raises(ConfigurationError):
        content_types(["json", "xml"])


def test_an_accept_list_takes_names_and_content_types() -> None:
    assert content_types(["json", "application/x-yaml"]) == {"application/json", "application/x-yaml"}


@pytest.mark.parametrize("method", ["gzip", "zlib", "bz2", "bzip2", "lzma", "xz", "zstd"])
@given(body=st.binary())
def test_what_is_compressed_comes_back(method: str, body: bytes) -> None:
    compressed, header = compress(body, method)

    assert decompress(compressed, header) == body


@pytest.mark.parametrize("method", ["gzip", "bz2", "lzma", "zstd"])
def test_a_body_that_was_cut_off_is_undecodable(method: str) -> None:
    compressed, header = compress(b"x" * 1000, method)

    with pytest.raises(Undecodable):
        decompress(compressed[:-1], header)


MEGABYTE = 1024 * 1024


@pytest.mark.parametrize("method", ["zlib", "bz2", "lzma", "zstd"])
def test_a_body_that_unpacks_past_the_limit_is_not_unpacked(method: str) -> None:
    body, header = compress(bytes(64 * MEGABYTE), method)
    tracemalloc.start()
    try:
        with pytest.raises(Undecodable, match="worker_max_body_size"):
            decompress(body, header, limit=MEGABYTE)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert most < 24 * MEGABYTE


@pytest.mark.parametrize("method", ["zlib", "bz2", "lzma", "zstd"])
def test_a_body_of_just_the_limit_is_unpacked(method: str) -> None:
    body, header = compress(b"x" * 70_000, method)

    assert decompress(body, header, limit=70_000) == b"x" * 70_000
    with pytest.raises(Undecodable):
        decompress(body, header, limit=69_999)


def test_streams_after_each_other_are_unpacked_but_not_without_end() -> None:
    one = compress(b"one", "bz2")[0]

    assert decompress(one * 3, "bz2") == b"one" * 3
    with pytest.raises(Undecodable, match="streams"):
        decompress(one * 1000, "bz2")


@pytest.mark.parametrize("header", [["zlib"], {"zlib": 1}, 5, b"zlib", True])
def test_a_compression_that_is_no_name_is_undecodable(header: Any) -> None:
    with pytest.raises(Undecodable, match="not known"):
        decompress(b"x", header)


@pytest.mark.parametrize(
    "encoding", ["punycode", "idna", "rot13", "hex", "zlib", "utf-7", "nonsense", "x" * 255, ["utf-8"]]
)
@pytest.mark.parametrize("kind", [JSON, YAML, PICKLE, MSGPACK])
def test_an_encoding_that_no_message_has_is_undecodable(kind: str, encoding: Any) -> None:
    with pytest.raises(Undecodable, match="content encoding"):
        loads(b"-" * 400_000, kind, encoding, frozenset({kind}))


@pytest.mark.parametrize("encoding", [None, "", "utf-8", "UTF-8", "utf_8", "utf8", "binary", "us-ascii"])
def test_the_encodings_of_task_messages_are_read(encoding: str | None) -> None:
    assert loads(b"[1]", JSON, encoding, frozenset({JSON})) == [1]


@pytest.mark.parametrize("kind", [["application/json"], 5, b"application/json"])
def test_a_content_type_that_is_no_text_is_not_accepted(kind: Any) -> None:
    with pytest.raises(ContentDisallowed):
        loads(b"[1]", kind, "utf-8", frozenset({JSON}))


def test_an_unknown_compression_is_an_error_of_its_own_on_each_side() -> None:
    with pytest.raises(ConfigurationError, match="no compression 'brötli'"):
        compress(b"", "brötli")
    with pytest.raises(Undecodable, match="application/x-new"):
        decompress(b"", "application/x-new")


class Money:
    """A value that no serializer knows by itself."""

    def __init__(self, cents: int) -> None:
        self.cents = cents


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`amqtask.serialization`; what is registered there is gone after the test."""
    for name in ("_BY_NAME", "_DUMP", "_LOAD", "_ENCODING", "_JSON_DECODERS"):
        monkeypatch.setattr(serialization, name, dict(getattr(serialization, name)))
    monkeypatch.setattr(serialization, "_JSON_ENCODERS", list(serialization._JSON_ENCODERS))
    return importlib.import_module("amqtask.serialization")


@pytest.mark.parametrize(
    ("encoding", "encode", "decode"),
    [
        ("utf-8", lambda money: str(money.cents), lambda text: Money(int(text))),
        ("binary", lambda money: b"%d" % money.cents, lambda raw: Money(int(raw.decode()))),
    ],
)
def test_a_serializer_of_one_s_own_is_used_by_its_name(own: Any, encoding: str, encode: Any, decode: Any) -> None:
    own.register("money", encode, decode, "application/x-money", encoding)

    written = dumps(Money(5), "money")
    read = loads(*written, content_types(["money"]))
    assert written == (b"5", "application/x-money", encoding)
    assert read.cents == 5
    with pytest.raises(ContentDisallowed, match="application/x-money"):
        loads(*written, content_types(["json"]))
    with pytest.raises(EncodeError, match="money cannot write this str"):
        dumps("text", "money")


def test_json_holds_a_type_that_was_registered(own: Any) -> None:
    own.register_type(Money, "money", lambda money: money.cents, Money)

    written = dumps({"price": Money(5), "when": dt.date(2026, 1, 2)}, "json")
    read = loads(*written, content_types(["json"]))
    assert (read["price"].cents, read["when"]) == (5, dt.date(2026, 1, 2))


def test_an_application_uses_a_serializer_of_one_s_own(own: Any) -> None:
    own.register("money", lambda value: repr(value), ast.literal_eval, "application/x-money")
    with AmqTask(
        "shop",
        broker="memory://",
        backend="cache+memory://",
        task_serializer="money",
        result_serializer="money",
        accept_content=["money"],
        set_as_current=False,
    ) as app:
        add = app.task(name="add")(lambda x, y: (x, y, x + y))
        with start_worker(app, pool="threads"):
            assert add.delay(1, y=2).get(60) == (1, 2, 3)
