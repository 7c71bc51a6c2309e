"""Task messages: we read what a real Celery wrote, and write the same for the same call."""

from __future__ import annotations

import pickle
from datetime import datetime, timezone
from typing import Any

import pytest

from amqtask.exceptions import ContentDisallowed
from amqtask.protocol.serialization import content_types
from amqtask.protocol.task import TaskCall, decode_body, encode_task, read_v1
from tests.protocol.recordings import VALUES, Recorded, listed, names, one, recorded

ALL = content_types(["json", "yaml", "msgpack", "pickle"])
ETA = datetime(2030, 1, 1, tzinfo=timezone.utc)
PLAIN = {"n": 1, "f": 1.5, "s": "ü", "l": [1, None, True]}
NOTHING = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
V2 = [name for name in names("task") if not name.startswith("v1")]


def signature(*args: Any, immutable: bool = False, task: str = "recorded.add", **options: Any) -> dict[str, Any]:
    return {
        "task": task,
        "args": list(args),
        "kwargs": {},
        "options": options,
        "subtask_type": None,
        "immutable": immutable,
    }


def add(*args: Any, **options: Any) -> TaskCall:
    return TaskCall(id="id-1", task="recorded.add", args=args or (2, 2), ignore_result=False, **options)


def echo(*args: Any, **options: Any) -> TaskCall:
    return TaskCall(id="id-1", task="recorded.echo", args=args, ignore_result=False, **options)


# What record.py called, as our own call (and how it is encoded).
CALLS: dict[str, tuple[TaskCall, dict[str, Any]]] = {
    "plain": (add(), {}),
    "no_args": (echo(), {}),
    "kwargs": (add(2, kwargs={"y": 3}), {}),
    "values": (echo(VALUES, kwargs={"when": VALUES["datetime"]}), {}),
    "nested_args": (echo([[[[[1]]]], {"a": {"b": {"c": {"d": 1}}}}]), {}),
    "long_args": (echo("x" * 5000, list(range(2000))), {}),
    "eta": (add(eta=ETA), {}),
    "expires_at": (add(expires=ETA), {}),
    "limits": (add(time_limit=30, soft_time_limit=20), {}),
    "shadow": (add(shadow="other name"), {}),
    "priority": (add(priority=7), {}),
    "headers": (add(headers={"tenant": "x", "n": 5}), {}),
    "transient": (add(delivery_mode=1), {}),
    "link": (add(callbacks=[signature(10, task_id="id-2")]), {}),
    "links": (add(callbacks=[signature(10, task_id="id-2"), signature(1, 1, immutable=True)]), {}),
    "link_error": (add(errbacks=[signature(task="recorded.echo", task_id="id-3")]), {}),
    "parents": (add(root_id="root", parent_id="parent"), {}),
    "group_member": (add(group="g-1", group_index=1), {}),
    "stamped": (add(stamped_headers=["tenant"], stamps={"tenant": ["x"]}), {}),
    **{f"serializer_{name}": (echo(PLAIN), {"serializer": name}) for name in ("json", "yaml", "msgpack", "pickle")},
    **{f"compression_{name}": (add(), {"compression": name}) for name in ("gzip", "zlib", "bzip2", "lzma", "zstd")},
    "pickle_values": (echo(VALUES), {"serializer": "pickle"}),
    "send_task": (TaskCall(id="id-1", task="elsewhere.task", args=(1,), kwargs={"k": "v"}), {}),
    "signature": (TaskCall(id="id-1", task="elsewhere.task", args=(1,)), {}),
}


def decoded(message: Recorded) -> tuple[Any, Any, dict[str, Any]]:
    properties = message.properties
    return decode_body(message.body, properties["content_type"], properties["content_encoding"], message.headers, ALL)


@pytest.mark.parametrize("name", V2)
def test_every_recorded_body_is_read(name: str) -> None:
    for message in recorded("task", name):
        args, kwargs, embed = decoded(message)

        assert isinstance(args, (list, tuple))
        assert isinstance(kwargs, dict)
        assert set(embed) == set(NOTHING)


@pytest.mark.parametrize("name", CALLS)
def test_a_recorded_body_is_read_as_it_was_meant(name: str) -> None:
    call, _ = CALLS[name]

    args, kwargs, embed = decoded(one("task", name))

    assert listed(args) == listed(call.args)
    assert listed(kwargs) == listed(call.kwargs)
    assert embed == call.embed


@pytest.mark.parametrize("name", CALLS)
def test_the_same_call_gives_the_same_headers(name: str) -> None:
    call, options = CALLS[name]
    theirs = dict(one("task", name).headers)

    _, properties = encode_task(call, **options)

    ours = dict(properties.headers)
    assert list(ours)[: len(theirs)] == list(theirs), "in the same order"
    for volatile in ("origin", "argsrepr") if name in ("long_args", "values", "pickle_values") else ("origin",):
        assert isinstance(ours.pop(volatile), str)
        del theirs[volatile]
    assert ours == theirs


@pytest.mark.parametrize("name", CALLS)
def test_the_same_call_gives_the_same_properties(name: str) -> None:
    call, options = CALLS[name]
    theirs = one("task", name).properties

    _, properties = encode_task(call, **options)

    for field in ("content_type", "content_encoding", "delivery_mode", "priority", "correlation_id"):
        assert getattr(properties, field) == theirs[field]


@pytest.mark.parametrize("name", CALLS)
def test_the_same_call_gives_the_same_body(name: str) -> None:
    call, options = CALLS[name]

    body, properties = encode_task(call, **options)

    if name == "compression_zstd":  # two implementations may choose differently
        headers = properties.headers
        assert decode_body(body, properties.content_type, properties.content_encoding, headers, ALL) == (
            [2, 2],
            {},
            NOTHING,
        )
    elif name.startswith("pickle"):  # later Pythons write the same values in another way
        assert pickle.loads(body) == pickle.loads(one("task", name).body)
    else:
        assert body == one("task", name).body


def test_relative_times_are_absolute_on_the_wire() -> None:
    countdown, expires = one("task", "countdown"), one("task", "expires_seconds")

    assert datetime.fromisoformat(countdown.headers["eta"]).tzinfo is not None
    ours = encode_task(add(expires=datetime.fromisoformat(expires.headers["expires"])))[1]
    assert ours.headers["expires"] == expires.headers["expires"]


def test_a_chain_is_stored_with_the_next_step_last() -> None:
    first = one("task", "chain")
    _, _, embed = decoded(first)
    chain = embed["chain"]
    assert [step["args"] for step in chain] == [[100], [10]]

    call = TaskCall(id=first.headers["id"], task="recorded.add", args=(1, 1), chain=chain, ignore_result=False)

    assert encode_task(call)[0] == first.body


def test_members_of_a_group_know_their_place() -> None:
    members = recorded("task", "group")

    assert [member.headers["group_index"] for member in members] == [0, 1]
    assert len({member.headers["group"] for member in members}) == 1


@pytest.mark.parametrize("name", ["serializer_pickle", "serializer_yaml", "serializer_msgpack"])
def test_what_is_not_accepted_is_not_even_read(name: str) -> None:
    message = one("task", name)

    with pytest.raises(ContentDisallowed, match="accept_content"):
        decode_body(message.body, message.properties["content_type"], None, {}, content_types(["json"]))


def test_protocol_v1_is_read_as_v2() -> None:
    message = one("task", "v1_eta")

    headers = read_v1(message.body, "application/json", "utf-8", ALL)
    args, kwargs, embed = decode_body(message.body, "application/json", "utf-8", headers, ALL)

    assert (headers["task"], headers["id"], headers["root_id"]) == ("recorded.add", "id-1", "id-1")
    assert headers["eta"] == headers["expires"] == "2030-01-01T00:00:00+00:00"
    assert headers["timelimit"] == [9, None]
    assert (args, kwargs, embed) == ([2, 2], {}, NOTHING)
