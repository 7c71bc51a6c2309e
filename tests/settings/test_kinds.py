"""What settings and options may be: what programs write is taken, anything else is an error that names it."""

from __future__ import annotations

import contextlib
import math
import uuid
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from amqtask import AmqTask, Queue
from amqtask.exceptions import ConfigurationError, EncodeError, WrongValue
from amqtask.protocol.option_types import CALL, TASK
from amqtask.settings import KINDS
from amqtask.settings.table import SETTINGS

NUMBERS = {setting.name for setting in SETTINGS if setting.kind in (
    "int", "float", "pause", "broker_seconds", "heartbeat", "port", "positive", "priority", "delivery_mode",
)}  # fmt: skip
SWITCHES = {setting.name for setting in SETTINGS if setting.kind == "bool"}
NO_NUMBERS = [
    -1,
    -0.5,
    math.nan,
    math.inf,
    -math.inf,
    1e300,
    10**400,
    True,
    "soon",
    "nan",
    "",
    b"5",
    [],
    {},
    object(),
    timedelta(-1),
]
NO_SWITCHES = ["maybe", "", 2, -1, 0.5, [], {}, object(), b"1"]


@pytest.fixture
def app() -> AmqTask:
    return AmqTask("kinds", broker="memory://", set_as_current=False)


def test_every_kind_of_the_table_is_known() -> None:
    assert {setting.kind for setting in SETTINGS} <= set(KINDS)


def test_every_default_is_of_its_kind() -> None:
    for setting in SETTINGS:
        if setting.default is not None:
            KINDS[setting.kind].convert(setting.default)


@pytest.mark.parametrize("name", sorted(NUMBERS))
def test_a_setting_that_is_a_number_takes_no_other(app: AmqTask, name: str) -> None:
    for value in NO_NUMBERS:
        with pytest.raises(WrongValue, match=f"setting {name} wants"):
            app.conf[name] = value


OPTIONS = (
    "retry_for",
    "polling_interval",
    "socket_timeout",
    "socket_connect_timeout",
    "max_connections",
    "unread_results",
)


@pytest.mark.parametrize("name", ["broker_transport_options", "result_backend_transport_options"])
@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_of_a_transport_that_is_a_number_takes_no_other(app: AmqTask, name: str, option: str) -> None:
    for value in NO_NUMBERS:
        with pytest.raises(WrongValue, match=f"setting {name}: {option} wants a") as caught:
            app.conf[name] = {option: value, "password": "hidden"}
        assert "hidden" not in str(caught.value)
    app.conf[name] = {option: "5", "other": [5], "socket_keepalive": None}

    assert app.conf[name] == {option: 5, "other": [5], "socket_keepalive": None}


@pytest.mark.parametrize("name", sorted(SWITCHES))
def test_a_setting_that_is_a_switch_takes_no_other(app: AmqTask, name: str) -> None:
    for value in NO_SWITCHES:
        with pytest.raises(WrongValue, match=f"setting {name} wants True or False"):
            app.conf[name] = value


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("result_expires", timedelta(hours=1), 3600.0),
        ("result_expires", "3600", 3600.0),
        ("result_expires", None, None),
        ("broker_heartbeat", 10.0, 10),
        ("broker_pool_limit", "0", 0),
        ("broker_pool_limit", None, None),
        ("task_ignore_result", "False", False),
        ("task_ignore_result", 1, True),
        ("task_default_delivery_mode", "transient", 1),
        ("accept_content", "json", ["json"]),
        ("accept_content", ("json", "pickle"), ["json", "pickle"]),
        ("accept_content", {"application/json"}, ["application/json"]),
        ("imports", ("a", "b"), ["a", "b"]),
        ("include", "a, b", ["a", "b"]),
        ("task_default_rate_limit", "100/m", "100/m"),
        ("task_default_rate_limit", 5, 5),
        ("worker_concurrency", "8", 8),
        ("worker_prefetch_multiplier", "1", 1),
        ("worker_redirect_stdouts_level", "info", "info"),
        ("result_backend_max_retries", math.inf, math.inf),
        ("broker_url", ["amqp://a", "amqp://b"], ["amqp://a", "amqp://b"]),
        ("task_routes", (lambda *args: None,), None),
    ],
)
def test_what_programs_write_is_taken(app: AmqTask, name: str, value: Any, found: Any) -> None:
    app.conf[name] = value

    assert found is None or app.conf[name] == found


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("task_serializer", "jason"), ("task_compression", "zip"), ("task_default_queue_type", "quorom"),
        ("task_default_rate_limit", "fast"), ("worker_redirect_stdouts_level", "LOUD"), ("broker_url", 5),
        ("task_queues", "work"), ("task_routes", 5), ("task_annotations", "x"), ("imports", [5]), ("accept_content", 5),
        ("task_default_queue", "q" * 300), ("task_default_priority", 256), ("broker_use_ssl", "perhaps"),
        ("control_queue_ttl", 5e6), ("broker_heartbeat", 70_000), ("broker_port", 0),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(app: AmqTask, name: str, value: Any) -> None:
    with pytest.raises(WrongValue, match=f"setting {name} wants"):
        app.conf[name] = value


def test_an_error_shows_no_secret(app: AmqTask) -> None:
    with pytest.raises(WrongValue) as caught:
        app.conf.redis_password = 12345

    assert "12345" not in str(caught.value)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.timedeltas() | st.datetimes()
    | st.uuids() | st.just(object()) | st.decimals(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)  # fmt: skip
APP = AmqTask("anything", broker="memory://", set_as_current=False)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(SETTINGS), ANYTHING)
@example(next(setting for setting in SETTINGS if setting.kind == "level"), 15)
def test_a_setting_with_anything_is_of_its_kind_or_an_error(setting: Any, value: Any) -> None:
    with contextlib.suppress(WrongValue), APP.conf.overridden({setting.name: value}):
        found = APP.conf[setting.name]
        again = None if found is None else KINDS[setting.kind].convert(found)
        assert again is found or repr(again) == repr(found)  # what is not a number (NaN) equals nothing


# -- options


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(sorted(CALL)), ANYTHING)
def test_a_call_with_anything_is_composed_or_an_error(name: str, value: Any) -> None:
    with contextlib.suppress(ConfigurationError, EncodeError):
        APP.caller.compose("t", (), {}, {name: value}, None)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(sorted(TASK)), ANYTHING)
def test_a_task_with_anything_is_made_or_an_error(name: str, value: Any) -> None:
    app = AmqTask("anything", broker="memory://", set_as_current=False)
    with contextlib.suppress(WrongValue):
        decorate: Any = app.task(**{"name": "t", name: value})
        decorate(lambda: None)
        app.finalize()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("autoretry_for", "x"), ("autoretry_for", (5,)), ("throws", 5), ("time_limit", "zzz"), ("time_limit", -1),
        ("soft_time_limit", math.nan), ("max_retries", -1), ("max_retries", "many"), ("default_retry_delay", -5),
        ("retry_backoff", "yes please"), ("retry_jitter", "maybe"), ("rate_limit", "fast"), ("acks_late", "sometimes"),
        ("priority", 300), ("queue", 5), ("retry_kwargs", [1]), ("expires", "soon"), ("ignore_result", 7),
    ],
)  # fmt: skip
def test_a_wrong_option_of_a_task_is_an_error_at_its_definition(app: AmqTask, option: str, value: Any) -> None:
    decorate: Any = app.task(name="mine", **{option: value})
    with pytest.raises(WrongValue, match=f"task mine: {option} wants"):
        decorate(lambda: None)

    class Mine(app.Task):  # type: ignore[misc, name-defined]
        name = "mine"

        def run(self) -> None: ...

    setattr(Mine, option, value)
    with pytest.raises(WrongValue, match=f"task mine: {option} wants"):
        app.register_task(Mine)


def test_options_as_programs_write_them(app: AmqTask) -> None:
    @app.task(
        name="mine", autoretry_for=[KeyError], throws=ValueError, max_retries=None, retry_backoff=True, rate_limit="10/s",
        time_limit="30", soft_time_limit=timedelta(seconds=20), default_retry_delay=1.5, acks_late=1, queue=Queue("q"),
    )  # fmt: skip
    def mine() -> None: ...

    app.finalize()
    assert mine.autoretry_for == (KeyError,)
    assert mine.throws == (ValueError,)
    assert (mine.time_limit, mine.soft_time_limit, mine.max_retries, mine.retry_backoff) == (30, 20, None, 1.0)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("countdown", "x"), ("countdown", math.inf), ("eta", "tomorrow"), ("expires", object()), ("priority", -1),
        ("priority", "high"), ("task_id", ""), ("task_id", "x" * 300), ("task_id", 5), ("queue", 5), ("headers", [1]),
        ("headers", {1: 2}), ("link", "task"), ("retries", -1), ("time_limit", -5), ("delivery_mode", 3), ("shadow", 5),
        ("routing_key", "k" * 300), ("ignore_result", "perhaps"), ("reply_to", 5), ("timeout", "long"),
        ("chain", 5), ("chain", {"task": "t"}), ("chord", 5), ("chord", {"": None}), ("link", {"name": "t"}),
        ("stamps", 5), ("stamped_headers", 5), ("group_index", "first"),
        ("replaced_task_nesting", -1), ("mandatory", "perhaps"), ("expiration", "soon"), ("expiration", -1), ("timestamp", "now"),
    ],
)  # fmt: skip
def test_a_wrong_option_of_a_call_names_task_option_and_what_is_wanted(app: AmqTask, option: str, value: Any) -> None:
    @app.task(name="mine")
    def mine() -> None: ...

    for refused in (
        lambda: mine.apply_async(**{option: value}),
        lambda: mine.signature(**{option: value}),
        lambda: mine.s().set(**{option: value}),
        lambda: app.send_task("mine", **{option: value}),
    ):
        with pytest.raises(WrongValue, match=f"task mine: {option} wants"):
            refused()


def test_calls_as_programs_write_them(app: AmqTask) -> None:
    task_id = uuid.uuid4()

    def compose(name: str, args: Any, kwargs: Any, options: dict[str, Any]) -> Any:
        return app.caller.compose(name, args, kwargs, options, None)

    assert compose("t", (), {}, {"task_id": task_id}).properties.headers["id"] == str(task_id)
    assert compose("t", (), {}, {"countdown": timedelta(seconds=-3)}).properties.headers["eta"]
    assert compose("t", (), {}, {"countdown": "5"}).properties.headers["eta"]
    assert compose("t", (), {}, {"expires": timedelta(hours=1)}).properties.headers["expires"]
    assert compose("t", (), {}, {"eta": "2030-01-01T00:00:00Z"}).properties.headers["eta"].startswith("2030")
    assert compose("t", (), {}, {"expires": datetime.now(timezone.utc), "priority": None}).properties.headers["expires"]
    assert compose("t", (), {}, {"priority": "7", "delivery_mode": "transient"}).properties.priority == 7
    assert compose("t", (), {}, {"expiration": 2.5}).properties.expiration == "2500"
    assert compose("t", (), {}, {"expiration": "2500"}).properties.expiration == "2500"
    assert compose("t", (), {}, {"stamped_headers": ("a",), "a": 1}).properties.headers["stamps"] == {"a": 1}
