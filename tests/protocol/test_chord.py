"""The parts of a chord that is joined in the broker."""

from __future__ import annotations

import json
from typing import Any

import pytest

from amqtask.exceptions import MessageError
from amqtask.protocol.chord import chord_queue, gather, new_token, queue_name, token_of

JSON = frozenset({"application/json"})
PLAIN: tuple[str | None, str | None] = ("application/json", "utf-8")


def read(meta: Any, headers: Any = None, *, raw: bytes | None = None) -> Any:
    body = json.dumps(meta).encode() if raw is None else raw
    return gather([(body, *PLAIN, headers)], JSON)


def test_a_groups_id_alone_does_not_lead_to_its_parts() -> None:
    token = new_token()
    assert len(token) >= 20
    assert new_token() != token
    assert chord_queue("g", token).name == queue_name("g", token) == f"amqtask.chord.g.{token}"
    assert queue_name("g", token) != queue_name("g")


@pytest.mark.parametrize("token", [None, 5, ["x"], {}])
def test_a_token_that_is_no_text_is_none(token: Any) -> None:
    assert token_of({"chord_token": token}) == ""


@pytest.mark.parametrize(
    "meta",
    [
        {"task_id": ["a"]}, {"task_id": {}}, {"task_id": None}, {"task_id": "a", "status": 5}, {"task_id": "a", "status": ["x"]},
        {"task_id": "a", "children": 5}, [], 5, None, {},
    ],
)  # fmt: skip
def test_a_part_that_is_no_result_is_a_message_error_and_no_other(meta: Any) -> None:
    with pytest.raises(MessageError):
        read(meta)


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b"[" * 100_000])
def test_a_body_that_does_not_decode_is_a_message_error(raw: bytes) -> None:
    with pytest.raises(MessageError):
        read(None, raw=raw)


@pytest.mark.parametrize("index", [None, "0", float("nan"), float("inf"), True, [1], 10**400])
def test_a_part_with_a_strange_place_comes_somewhere(index: Any) -> None:
    meta = {"task_id": "a", "status": "SUCCESS", "result": 1}
    gathered = gather(
        [(json.dumps(meta).encode(), *PLAIN, {"group_index": index}),
         (json.dumps({**meta, "task_id": "b"}).encode(), *PLAIN, {"group_index": 0})],
        JSON,
    )  # fmt: skip

    assert {part.task_id for part in gathered.in_order()} == {"a", "b"}


@pytest.mark.parametrize("more", [5, ["a"], {"a": 1}, 1.5])
def test_a_member_that_is_added_has_a_text_as_id(more: Any) -> None:
    with pytest.raises(MessageError):
        read({}, {"more": more})
