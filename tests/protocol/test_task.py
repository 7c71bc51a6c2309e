"""Task messages that nobody recorded: odd input, bounded reprs, republishing."""

from __future__ import annotations

import gzip
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amqtask.exceptions import EncodeError, InvalidTaskError, MessageError, Undecodable
from amqtask.protocol.compression import compress
from amqtask.protocol.message import strip_transit_headers
from amqtask.protocol.serialization import content_types
from amqtask.protocol.task import TaskCall, decode_body, encode_task, read_v1, saferepr

JSON = content_types(["json"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


class Hostile:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


@given(st.lists(json_values, max_size=4), st.dictionaries(st.text(), json_values, max_size=4))
def test_what_is_written_is_read(args: list[Any], kwargs: dict[str, Any]) -> None:
    body, properties = encode_task(TaskCall(id="1", task="t", args=args, kwargs=kwargs))

    read = decode_body(body, properties.content_type, properties.content_encoding, properties.headers, JSON)

    assert read[:2] == (args, kwargs)


@pytest.mark.parametrize(
    "body", [b"[]", b"[[], {}]", b"[1, {}, {}]", b"[[], [], {}]", b"[[], {}, 5]", b"3", b"null", b'{"a": 1}', b'"abc"']
)
def test_a_body_of_another_shape_is_no_task(body: bytes) -> None:
    with pytest.raises(InvalidTaskError):
        decode_body(body, "application/json", "utf-8", {}, JSON)


@pytest.mark.parametrize("body", [b"", b"[[], {}", b"\xff\xfe", b"[" * 200_000])
def test_a_broken_body_is_undecodable(body: bytes) -> None:
    with pytest.raises(Undecodable):
        decode_body(body, "application/json", "utf-8", {}, JSON)


@pytest.mark.parametrize(
    "headers",
    [
        {"group": ["g"]},
        {"root_id": 5},
        {"parent_id": {"a": 1}},
        {"shadow": ["s"]},
        {"retries": "1"},
        {"retries": -1},
        {"group_index": 1.5},
        {"stamped_headers": 5},
        {"stamped_headers": [["a"]]},
        {"stamped_headers": ["a"], "stamps": ["a"]},
        {"compression": ["zlib"]},
        {"compression": {"zlib": 1}},
    ],
)
def test_headers_of_other_types_are_a_message_error(headers: dict[str, Any]) -> None:
    with pytest.raises(MessageError):
        decode_body(b"[[], {}, {}]", "application/json", "utf-8", headers, JSON)


@pytest.mark.parametrize(
    "embed",
    [
        {"callbacks": 5},
        {"callbacks": "abc"},
        {"callbacks": [5]},
        {"errbacks": {"task": "t"}},
        {"chain": [{"task": 5}]},
        {"chain": [{"task": "t", "options": 5}]},
        {"chain": [{"task": "t", "kwargs": [1]}]},
        {"chord": [1]},
        {"chord": {"task": None}},
        {"chord": {"task": "celery.chord", "kwargs": {"body": 5}}},
        {"chain": [{"task": "celery.group", "kwargs": {"tasks": 5}}]},
        {"chain": [{"task": "celery.chain", "kwargs": {"tasks": ["x"]}}]},
        {"errbacks": [{"task": "t", "options": {"link_error": 5}}]},
    ],
)
def test_what_follows_must_be_signatures(embed: dict[str, Any]) -> None:
    body = json.dumps([[], {}, embed]).encode()

    with pytest.raises(InvalidTaskError, match="signature"):
        decode_body(body, "application/json", "utf-8", {}, JSON)


def test_a_body_that_is_larger_than_the_limit_is_not_read() -> None:
    with pytest.raises(Undecodable, match="worker_max_body_size"):
        decode_body(b"[[], {}, {}]", "application/json", "utf-8", {}, JSON, limit=5)


@pytest.mark.parametrize("header", ["application/x-gzip", "application/zstd", "gzip", "application/x-nothing"])
def test_a_broken_or_unknown_compression_is_undecodable(header: str) -> None:
    with pytest.raises(Undecodable):
        decode_body(b"not compressed", "application/json", "utf-8", {"compression": header}, JSON)


@given(st.binary(max_size=200))
def test_no_body_raises_anything_but_a_message_error(body: bytes) -> None:
    try:
        decode_body(body, "application/json", "utf-8", {}, JSON)
    except MessageError:
        pass


def test_an_embed_of_none_means_nothing_follows() -> None:
    args, kwargs, embed = decode_body(b"[[], {}, null]", "application/json", "utf-8", {}, JSON)

    assert (args, kwargs, any(embed.values())) == ([], {}, False)


def test_real_gzip_is_read_too() -> None:
    body = gzip.compress(b"[[1], {}, null]")

    assert decode_body(body, "application/json", "utf-8", {"compression": "application/x-gzip"}, JSON)[0] == [1]
    assert compress(b"x", "gzip")[1] == "application/x-gzip"


def test_arguments_that_cannot_be_written_are_the_callers_error() -> None:
    with pytest.raises(EncodeError, match="json cannot write"):
        encode_task(TaskCall(id="1", task="t", args=({1, 2},)))


@pytest.mark.parametrize("body", [b"[]", b"{}", b'{"task": "t"}', b'{"id": "1"}', b"1", b'{"task": 1, "id": "1"}'])
def test_a_message_without_name_and_id_is_no_task(body: bytes) -> None:
    with pytest.raises(InvalidTaskError, match="no task message"):
        read_v1(body, "application/json", "utf-8", JSON)


def test_what_a_broker_wrote_is_not_sent_again() -> None:
    headers = {
        "task": "t",
        "x-death": [{"queue": "q"}],
        "x-first-death-queue": "q",
        "x-last-death-reason": "expired",
        "x-delivery-count": 3,
        "amqtask-delay-0": "f",
        "amqtask-delay-to": "",
        "CC": ["other"],
        "BCC": ["another"],
        "x-mine": "stays",
        "CCC": "stays",
    }

    assert strip_transit_headers(headers) == {"task": "t", "x-mine": "stays", "CCC": "stays"}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ((2, 2), "(2, 2)"),
        ((1,), "(1,)"),
        ((), "()"),
        ({}, "{}"),
        ({"a": [1, "x", None]}, "{'a': [1, 'x', None]}"),
        ([[[[1]]]], "[[[[...]]]]"),
        ([[[[]]]], "[[[[]]]]"),
    ],
)
def test_small_values_have_their_own_repr(value: Any, text: str) -> None:
    assert saferepr(value) == text


@pytest.mark.parametrize(
    "value", [math.factorial(2000), [math.factorial(2000)], {"n": -(10**9999)}, {10**9999}], ids=range(4)
)
def test_a_number_of_too_many_digits_is_told_by_its_size(value: Any) -> None:
    text = saferepr(value)

    assert len(text) <= 1024
    assert "bits" in text or "repr() raised" in text


def test_a_repr_that_raises_is_said_so() -> None:
    assert "Hostile" in saferepr((Hostile(), 1))


def test_a_list_in_itself_has_an_end() -> None:
    value: list[Any] = [1]
    value.append(value)

    assert saferepr(value).startswith("[1, [1, [")


@given(json_values | st.lists(st.text(), min_size=50) | st.binary(min_size=2000))
def test_a_repr_is_never_longer_than_its_limit(value: Any) -> None:
    assert len(saferepr((value,))) <= 1024


def test_a_huge_argument_is_not_formatted_as_a_whole() -> None:
    class Counted(int):
        seen = 0

        def __repr__(self) -> str:
            Counted.seen += 1
            return "x"

    assert len(saferepr([Counted()] * 100_000)) <= 1024
    assert Counted.seen < 2000
