"""Results: we read what a real Celery stored, and store the same."""

from __future__ import annotations

import pytest

from amqtask import exceptions, states
from amqtask.exceptions import Undecodable
from amqtask.protocol.result import (
    RemoteError,
    ResultMessage,
    decode_result,
    encode_result,
    exception_as_dict,
    exception_from_dict,
)
from amqtask.protocol.serialization import content_types
from tests.protocol.recordings import VALUES, listed, names, one

ALL = content_types(["json", "pickle"])
JSON_RESULTS = [name for name in names("result") if not name.startswith("pickle")]
# Pickles of classes that only the worker had cannot be read anywhere else.
PICKLED = [name for name in names("result") if name.startswith("pickle") and name != "pickle_failure_odd"]


def read(name: str) -> ResultMessage:
    message = one("result", name)
    content_type = "application/x-python-serialize" if name.startswith("pickle") else "application/json"
    return decode_result(message.body, content_type, None, ALL)


@pytest.mark.parametrize("name", [name for name in JSON_RESULTS + PICKLED if not name.endswith("unregistered")])
def test_every_recorded_result_is_read(name: str) -> None:
    result = read(name)

    assert result.task_id == name.replace("_", "-", 1)
    assert result.status in (states.SUCCESS, states.FAILURE, states.RETRY)
    assert (result.date_done is not None) == result.is_ready


@pytest.mark.parametrize("name", JSON_RESULTS)
def test_what_was_read_is_written_as_the_same_bytes(name: str) -> None:
    message = one("result", name)

    written = encode_result(read(name), "json").body

    assert written == message.body


@pytest.mark.parametrize("kind", ["rpc", "redis", "pickle"])
def test_values_come_back_as_what_they_were(kind: str) -> None:
    assert listed(read(f"{kind}_values").result) == listed(VALUES)


@pytest.mark.parametrize("kind", ["rpc", "redis", "pickle"])
def test_a_failure_comes_back_as_its_own_exception(kind: str) -> None:
    result = read(f"{kind}_failure")

    error = exception_from_dict(result.result, result.traceback)

    assert type(error) is ValueError
    assert error.args == ("wrong", 3)
    assert "recorded/record.py" in str(error.__cause__)


def test_an_exception_is_written_as_celery_writes_it() -> None:
    assert exception_as_dict(ValueError("wrong", 3)) == read("rpc_failure").result
    assert exception_as_dict(KeyError(object, {"a": {1}})) == read("rpc_failure_object").result


def test_an_unknown_exception_keeps_its_name_and_arguments() -> None:
    error = exception_from_dict(read("rpc_failure_odd").result)

    assert isinstance(error, RemoteError)
    assert type(error).__name__ == "Odd"
    assert type(error).__module__ == "record"
    assert error.args == (7, "odd")
    assert type(exception_from_dict(read("redis_failure_odd").result)) is type(error)


def test_celerys_own_exceptions_become_ours() -> None:
    error = exception_from_dict(read("redis_unregistered").result)

    assert type(error) is exceptions.NotRegistered
    assert str(error) == "recorded.nowhere"


def test_extended_fields_are_kept() -> None:
    result = read("extended_success")

    assert result.extra == {
        "name": "recorded.add",
        "args": [2, 2],
        "kwargs": {},
        "worker": "rec@host",
        "retries": 0,
        "queue": "recorded",
    }


def test_children_and_family_are_kept() -> None:
    assert len(read("rpc_children").children) == 1
    group = read("rpc_group")
    assert (group.group_id, group.parent_id) == ("g-1", "p-1")


def test_a_pickle_of_a_class_that_is_not_here_is_undecodable() -> None:
    with pytest.raises(Undecodable):
        read("pickle_failure_odd")
