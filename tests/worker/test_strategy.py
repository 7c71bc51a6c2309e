"""What the headers of a message say about what is to be done with it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from amqtask.exceptions import InvalidTaskError
from amqtask.protocol.message import Delivery, Properties
from amqtask.protocol.serialization import JSON
from amqtask.protocol.task import decode_body, timestamp
from amqtask.worker.strategy import Action, Strategies, TaskStrategy, judge, read_request, read_strange
from tests.worker.bench import FakeTask

NOW = 1_700_000_000.0  # 2023-11-14T22:13:20Z


def delivery(
    headers: dict[str, Any] | None = None,
    body: bytes = b"[[], {}, {}]",
    *,
    redelivered: bool = False,
    content_type: str = "application/json",
    content_encoding: str = "utf-8",
) -> Delivery:
    properties = Properties(content_type=content_type, content_encoding=content_encoding, headers=headers or {})
    return Delivery(body, properties, "", "q", redelivered, "q", 7, 1)


def request_of(**headers: Any) -> Any:
    redelivered = bool(headers.pop("redelivered", False))
    return read_request(
        delivery({"task": "t", "id": "i", **headers}, redelivered=redelivered), 1, "t", TaskStrategy("t", None)
    )


@pytest.mark.parametrize(
    ("headers", "action"),
    [
        ({}, Action.RUN),
        ({"eta": None, "expires": None}, Action.RUN),
        ({"eta": "2023-11-14T22:13:19+00:00"}, Action.RUN),
        ({"eta": "2023-11-14T22:13:20.050000+00:00"}, Action.SOON),
        ({"eta": "2023-11-14T22:13:21+00:00"}, Action.DELAY),
        ({"eta": "2023-11-14T22:13:21Z"}, Action.DELAY),
        ({"eta": "2023-11-15T00:13:21+02:00"}, Action.DELAY),
        ({"eta": "2023-11-14T22:13:21"}, Action.DELAY),
        ({"expires": "2023-11-14T22:13:21+00:00"}, Action.RUN),
        ({"expires": "2023-11-14T22:13:20+00:00"}, Action.EXPIRED),
        ({"eta": "2023-11-14T22:13:30+00:00", "expires": "2023-11-14T22:13:19+00:00"}, Action.EXPIRED),
        ({"eta": "tomorrow"}, Action.REFUSE),
        ({"expires": 12}, Action.REFUSE),
        ({"redelivered": True, "x-delivery-count": 4}, Action.RUN),
        ({"redelivered": True, "x-delivery-count": 5}, Action.DEAD_LETTER),
        ({"redelivered": False, "x-delivery-count": 9}, Action.RUN),
    ],
)
def test_headers_decide(headers: dict[str, Any], action: Action) -> None:
    verdict = judge(request_of(**headers), lambda: NOW, delivery_limit=5)

    assert verdict.action is action


def test_a_deadline_is_kept_for_the_time_the_request_waits() -> None:
    verdict = judge(request_of(expires="2023-11-14T22:13:21+00:00"), lambda: NOW, delivery_limit=5)

    assert verdict.deadline == NOW + 1


def test_without_a_delivery_limit_nothing_is_buried() -> None:
    request = request_of(redelivered=True, **{"x-delivery-count": 100})

    assert judge(request, lambda: NOW, delivery_limit=None).action is Action.RUN


def test_times_without_an_offset_are_utc() -> None:
    assert timestamp("2023-11-14T22:13:20") == NOW


@pytest.mark.parametrize(
    ("timelimit", "hard", "soft"),
    [
        (None, 60.0, 30.0),
        ([None, None], 60.0, 30.0),
        ([5, None], 5, 30.0),
        ([None, 3], 60.0, 3),
        ([5, 3], 5, 3),
        ("nonsense", 60.0, 30.0),
        ([1, 2, 3], 60.0, 30.0),
        ([0, 0], 60.0, 30.0),
        ([-5, -5], 60.0, 30.0),
        ([float("nan"), float("nan")], 60.0, 30.0),
        ([float("inf"), 1e300], 60.0, 30.0),
        ([10**400, True], 60.0, 30.0),
    ],
)
def test_the_messages_own_time_limits_win(timelimit: Any, hard: float, soft: float) -> None:
    strategy = TaskStrategy("t", None, hard_limit=60.0, soft_limit=30.0)
    request = read_request(delivery({"task": "t", "id": "i", "timelimit": timelimit}), 1, "t", strategy)

    assert (request.hard_limit, request.soft_limit) == (hard, soft)


@pytest.mark.parametrize("limit", [0, -1, 0.0, float("nan"), float("inf"), 1e300])
def test_a_limit_of_a_task_that_is_no_time_is_no_limit(limit: float) -> None:
    task: Any = FakeTask(time_limit=limit, soft_time_limit=limit)
    strategy = TaskStrategy("t", task, hard_limit=60.0, soft_limit=30.0)

    assert (strategy.hard_limit, strategy.soft_limit) == (None, None)


@pytest.mark.parametrize("task_id", ["x" * 256, "one\nline", "\x1b[2J", b"\xff", ["i"], {"i": 1}, 1.5])
def test_an_id_that_cannot_stand_in_a_line_is_refused(task_id: Any) -> None:
    with pytest.raises(InvalidTaskError, match="id of the task"):
        request_of(id=task_id)


@pytest.mark.parametrize("count", ["many", -1, None, [1], 2.5])
def test_a_count_of_deliveries_that_no_broker_wrote_is_none(count: Any) -> None:
    assert request_of(redelivered=True, **{"x-delivery-count": count}).attempts == 0


@pytest.mark.parametrize(
    "eta",
    ["9" * 60_000, "9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+23:59", 12, ["now"], b"2020"],
    ids=range(6),
)
def test_a_time_that_is_none_is_refused_in_a_line(eta: Any) -> None:
    verdict = judge(request_of(eta=eta), lambda: NOW, delivery_limit=5)

    assert verdict.action in (Action.REFUSE, Action.DELAY, Action.RUN)
    assert len(verdict.reason) < 400


def test_a_long_name_is_not_compared_with_others() -> None:
    strategies = Strategies({"proj.add": None})  # type: ignore[dict-item]

    assert len(strategies["proj.add" * 100_000].problem) < 500


@pytest.mark.parametrize(
    "fields",
    [
        {"task": "t" * 200_000},
        {"id": "i" * 200_000},
        {"id": "a\nb"},
        {"eta": "e" * 200_000},
        {"expires": 5},
        {"group": ["g"]},
        {"retries": "1"},
        {"retries": -1},
        {"padding": "x" * (5 * 1024 * 1024)},
    ],
)
def test_a_protocol_v1_message_that_cannot_be_taken_is_refused_in_a_line(fields: dict[str, Any]) -> None:
    body = json.dumps({"task": "t", "id": "i", "args": [], "kwargs": {}, **fields}).encode()
    _, error = read_strange(delivery(body=body), 1, frozenset({JSON}))

    assert type(error).__name__ == "InvalidTaskError"
    assert len(str(error)) < 500


def test_a_protocol_v1_message_in_an_encoding_of_no_task_message_is_refused() -> None:
    _, error = read_strange(delivery(body=b"-" * 400_000, content_encoding="punycode"), 1, frozenset({JSON}))

    assert "punycode" in str(error)


def test_an_id_that_is_no_text_becomes_one() -> None:
    assert request_of(id=12).id == "12"


def test_a_protocol_v1_message_is_read_from_its_body() -> None:
    body = b'{"task": "t", "id": "i", "args": [1], "kwargs": {"b": 2}, "retries": 1, "timelimit": [9, 8]}'
    request, error = read_strange(delivery(body=body), 1, frozenset({"application/json"}))

    assert error is None
    assert (request.task, request.id, request.headers["retries"]) == ("t", "i", 1)
    args, kwargs, _ = decode_body(body, JSON, "utf-8", request.headers, frozenset({JSON}))
    assert (args, kwargs) == ([1], {"b": 2})
    assert (request.hard_limit, request.soft_limit) == (9, 8)


@pytest.mark.parametrize("body", [b"", b"\xff\xfe", b"[]", b"{}", b'"text"', b'{"task": "t"}'])
def test_what_is_no_task_message_says_so(body: bytes) -> None:
    request, error = read_strange(delivery(body=body), 1, frozenset({"application/json"}))

    assert error is not None
    assert request.delivery is not None


def test_a_disallowed_content_type_is_not_decoded() -> None:
    _, error = read_strange(
        delivery(body=b"cos\nsystem\n", content_type="application/x-python-serialize"),
        1,
        frozenset({"application/json"}),
    )

    assert type(error).__name__ == "ContentDisallowed"


def test_an_unknown_name_gets_a_hint_and_is_not_kept() -> None:
    strategies = Strategies({"proj.add": None})  # type: ignore[dict-item]

    strategy = strategies["proj.ad"]

    assert strategy.task is None
    assert "'proj.add'" in strategy.problem
    assert "proj.ad" not in strategies
