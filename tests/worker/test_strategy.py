"""What the headers of a message say about what is to be done with it."""

from __future__ import annotations

from typing import Any

import pytest

from amqtask.message import Delivery, Properties
from amqtask.worker.legacy import read_legacy
from amqtask.worker.strategies import Strategies
from amqtask.worker.strategy import Kind, TaskStrategy, judge, read_request, timestamp

NOW = 1_700_000_000.0  # 2023-11-14T22:13:20Z


def delivery(
    headers: dict[str, Any] | None = None,
    body: bytes = b"[[], {}, {}]",
    *,
    redelivered: bool = False,
    content_type: str = "application/json",
) -> Delivery:
    properties = Properties(content_type=content_type, content_encoding="utf-8", headers=headers or {})
    return Delivery(body, properties, "", "q", redelivered, "q", 7, 1)


def request_of(**headers: Any) -> Any:
    redelivered = bool(headers.pop("redelivered", False))
    return read_request(
        delivery({"task": "t", "id": "i", **headers}, redelivered=redelivered), 1, "t", TaskStrategy("t", None)
    )


@pytest.mark.parametrize(
    ("headers", "kind"),
    [
        ({}, Kind.RUN),
        ({"eta": None, "expires": None}, Kind.RUN),
        ({"eta": "2023-11-14T22:13:19+00:00"}, Kind.RUN),
        ({"eta": "2023-11-14T22:13:20.050000+00:00"}, Kind.SOON),
        ({"eta": "2023-11-14T22:13:21+00:00"}, Kind.DELAY),
        ({"eta": "2023-11-14T22:13:21Z"}, Kind.DELAY),
        ({"eta": "2023-11-15T00:13:21+02:00"}, Kind.DELAY),
        ({"eta": "2023-11-14T22:13:21"}, Kind.DELAY),
        ({"expires": "2023-11-14T22:13:21+00:00"}, Kind.RUN),
        ({"expires": "2023-11-14T22:13:20+00:00"}, Kind.EXPIRED),
        ({"eta": "2023-11-14T22:13:30+00:00", "expires": "2023-11-14T22:13:19+00:00"}, Kind.EXPIRED),
        ({"eta": "tomorrow"}, Kind.REFUSE),
        ({"expires": 12}, Kind.REFUSE),
        ({"redelivered": True, "x-delivery-count": 4}, Kind.RUN),
        ({"redelivered": True, "x-delivery-count": 5}, Kind.BURY),
        ({"redelivered": False, "x-delivery-count": 9}, Kind.RUN),
    ],
)
def test_headers_decide(headers: dict[str, Any], kind: Kind) -> None:
    verdict = judge(request_of(**headers), lambda: NOW, delivery_limit=5)

    assert verdict.kind is kind


def test_a_deadline_is_kept_for_the_time_the_request_waits() -> None:
    verdict = judge(request_of(expires="2023-11-14T22:13:21+00:00"), lambda: NOW, delivery_limit=5)

    assert verdict.deadline == NOW + 1


def test_without_a_delivery_limit_nothing_is_buried() -> None:
    request = request_of(redelivered=True, **{"x-delivery-count": 100})

    assert judge(request, lambda: NOW, delivery_limit=None).kind is Kind.RUN


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
    ],
)
def test_the_messages_own_time_limits_win(timelimit: Any, hard: float, soft: float) -> None:
    strategy = TaskStrategy("t", None, hard_limit=60.0, soft_limit=30.0)
    request = read_request(delivery({"task": "t", "id": "i", "timelimit": timelimit}), 1, "t", strategy)

    assert (request.hard_limit, request.soft_limit) == (hard, soft)


def test_an_id_that_is_no_text_becomes_one() -> None:
    assert request_of(id=12).id == "12"


def test_a_protocol_v1_message_is_read_from_its_body() -> None:
    body = b'{"task": "t", "id": "i", "args": [1], "kwargs": {"b": 2}, "retries": 1, "timelimit": [9, 8]}'
    request, error = read_legacy(delivery(body=body), 1, frozenset({"application/json"}))

    assert error is None
    assert (request.task, request.id, request.headers["retries"]) == ("t", "i", 1)
    assert request.decoded is not None
    assert tuple(request.decoded[:2]) == ([1], {"b": 2})
    assert (request.hard_limit, request.soft_limit) == (9, 8)


@pytest.mark.parametrize("body", [b"", b"\xff\xfe", b"[]", b"{}", b'"text"', b'{"task": "t"}'])
def test_what_is_no_task_message_says_so(body: bytes) -> None:
    request, error = read_legacy(delivery(body=body), 1, frozenset({"application/json"}))

    assert error is not None
    assert request.delivery is not None


def test_a_disallowed_content_type_is_not_decoded() -> None:
    _, error = read_legacy(
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
