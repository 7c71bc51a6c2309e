"""Results and exceptions that nobody recorded."""

from __future__ import annotations

import asyncio
import sys
import types
from typing import Any

import pytest
from greenlet import GreenletExit

from amqtask.exceptions import (
    EncodeError,
    MaxRetriesExceededError,
    TaskRevokedError,
    TimeLimitExceeded,
    Undecodable,
    WorkerLostError,
)
from amqtask.protocol.chord import gather
from amqtask.protocol.result import (
    RemoteError,
    RemoteTraceback,
    ResultMessage,
    decode_result,
    encode_result,
    exception_as_dict,
    exception_from_dict,
    is_reply_queue,
    stamps_in_result,
)
from amqtask.protocol.serialization import content_types

JSON = content_types(["json"])


class TwoArguments(Exception):
    def __init__(self, code: int, why: str) -> None:
        super().__init__(f"{code}: {why}")


class NeedsItsInit(Exception):
    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code

    def __str__(self) -> str:
        return f"{self.code}"


class Outer:
    class Nested(Exception):
        pass


def there_and_back(error: BaseException) -> BaseException:
    message = ResultMessage("1", "FAILURE", exception_as_dict(error), "Traceback …")
    read = decode_result(*encode_result(message), JSON)
    return exception_from_dict(read.result, read.traceback)


@pytest.mark.parametrize(
    "error", [ValueError("a", 1), KeyError("k"), OSError(2, "no"), Outer.Nested("x"), TwoArguments(1, "b"), Exception()]
)
def test_an_exception_comes_back_as_its_own_type(error: Exception) -> None:
    back = there_and_back(error)

    assert type(back) is type(error)
    assert str(back) == str(error)
    assert isinstance(back.__cause__, RemoteTraceback)


def test_an_exception_that_cannot_be_rebuilt_keeps_its_name() -> None:
    back = there_and_back(NeedsItsInit(1, "why"))

    assert isinstance(back, RemoteError)
    assert type(back).__name__ == "NeedsItsInit"
    assert back.args == ("why",)


@pytest.mark.parametrize(
    "error", [TaskRevokedError("revoked"), TimeLimitExceeded(5), WorkerLostError("gone"), MaxRetriesExceededError("no")]
)
def test_an_exception_that_celery_has_too_is_told_as_celery_s_and_read_as_ours(error: Exception) -> None:
    found = exception_as_dict(error)

    assert (found["exc_module"], found["exc_type"]) == ("celery.exceptions", type(error).__name__)
    assert type(exception_from_dict(found)) is type(error)


@pytest.mark.parametrize(
    "error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError(), GreenletExit()]
)
def test_a_remote_exit_does_not_end_this_process(error: BaseException) -> None:
    back = there_and_back(error)

    assert isinstance(back, RemoteError)
    assert type(back).__name__ == type(error).__name__


@pytest.mark.parametrize(
    ("module", "name"),
    [("os", "system"), ("builtins", "eval"), ("subprocess", "Popen"), ("os", "path.join"), ("nowhere.at.all", "X")],
)
def test_only_exceptions_are_ever_called(module: str, name: str) -> None:
    error = exception_from_dict({"exc_type": name, "exc_module": module, "exc_message": ["true"]})

    assert isinstance(error, RemoteError)


def test_nothing_is_imported_because_a_message_says_so() -> None:
    sys.modules.pop("xml.sax.xmlreader", None)
    exception_from_dict({"exc_type": "X", "exc_module": "xml.sax.xmlreader", "exc_message": []})

    assert "xml.sax.xmlreader" not in sys.modules


@pytest.mark.parametrize("found", ["text", None, 3, {}, {"exc_type": "X"}, {"exc_type": 1, "exc_message": None}])
def test_whatever_a_failure_says_an_exception_is_made_of_it(found: Any) -> None:
    assert isinstance(exception_from_dict(found), Exception)


def test_an_argument_that_cannot_be_written_is_its_repr() -> None:
    found = exception_as_dict(ValueError({1}, b"ok", object))

    assert found["exc_message"] == ["{1}", b"ok", "<class 'object'>"]


def test_a_result_that_cannot_be_written_is_named() -> None:
    with pytest.raises(EncodeError, match="result of task 7, a set, cannot be written as json"):
        encode_result(ResultMessage("7", "SUCCESS", {1, 2}))


ODD_RESULTS = [
    b'{"task_id": ["i"]}',
    b'{"task_id": {}}',
    b'{"task_id": "i", "status": ["SUCCESS"]}',
    b'{"task_id": "i", "children": 5}',
    b'{"task_id": "i", "traceback": 5}',
    b'{"task_id": "i", "date_done": [2020]}',
]


@pytest.mark.parametrize("body", ODD_RESULTS)
def test_a_part_of_a_chord_that_is_no_result_is_undecodable(body: bytes) -> None:
    with pytest.raises(Undecodable):
        gather([(body, "application/json", "utf-8", {"group_index": 0})], frozenset({"application/json"}))


@pytest.mark.parametrize("body", [b"[]", b"{}", b"1", b'{"status": "SUCCESS"}', *ODD_RESULTS])
def test_what_is_no_result_is_undecodable(body: bytes) -> None:
    with pytest.raises(Undecodable):
        decode_result(body, "application/json", "utf-8", JSON)


# -- where results go, and what they may be taken for


@pytest.mark.parametrize(
    "name",
    [
        "0b5f0d8e-5a1c-3b56-9a3c-0f9b1f0a7c11", "0B5F0D8E-5A1C-3B56-9A3C-0F9B1F0A7C11", "0b5f0d8e5a1c3b569a3c0f9b1f0a7c11",
        "amq.gen-JzTY20BRgKO-HjmUJj0wLg", "amq.rabbitmq.reply-to.g2dkAA5yYWJiaXRAbG9jYWwAAAF.x+/Q==",
    ],
)  # fmt: skip
def test_reply_queues_are_named_by_uuids_and_by_brokers(name: str) -> None:
    assert is_reply_queue(name)


@pytest.mark.parametrize(
    "name",
    [
        "w1@host.celery.pidbox", "0b5f0d8e-5a1c-3b56-9a3c-0f9b1f0a7c11.reply.celery.pidbox", "celery", "amqtask", "amqtask.dead",
        "amqtask.chord.0b5f0d8e-5a1c-3b56-9a3c-0f9b1f0a7c11", "celeryev.0b5f0d8e-5a1c-3b56-9a3c-0f9b1f0a7c11", "bcast.x",
        "", "0b5f0d8e-5a1c-3b56-9a3c-0f9b1f0a7c1", "0b5f0d8e-5a1c-3b56-9a3c-0f9b1f0a7c11\n", "amq.direct", "amq.gen-",
    ],
)  # fmt: skip
def test_no_other_queue_is_a_reply_queue(name: str) -> None:
    assert not is_reply_queue(name)


def test_an_operator_may_name_more_reply_queues() -> None:
    assert is_reply_queue("replies.web1", ["replies.*"])
    assert not is_reply_queue(5, ["*"])  # of a follow-up: whatever JSON can say
    assert not is_reply_queue("web1", ["replies.*"])


def test_stamps_are_fields_of_a_result_unless_they_mean_something_else() -> None:
    stamps = {"customer": "7", "method": "shutdown", "destination": None, "task": "t", "status": "SUCCESS"}

    assert stamps_in_result(list(stamps), stamps) == {"stamped_headers": ["customer"], "customer": "7"}


@pytest.mark.parametrize(
    ("names", "stamps"),
    [(5, {}), ("customer", {"customer": 1}), ([["x"]], {}), (["x"], 5), (["method"], {"method": 1})],
)
def test_stamps_that_are_none_are_left_out(names: Any, stamps: Any) -> None:
    assert stamps_in_result(names, stamps) == {}


@pytest.mark.parametrize(
    "found",
    [
        {"exc_type": "a\0b"}, {"exc_type": "\ud800"}, {"exc_type": ""}, {"exc_type": "x" * 10_000}, {"exc_type": ["x"]},
        {"exc_type": "x", "exc_module": ["x"]}, {"exc_type": "settings.X", "exc_module": "django.conf"},
        {"exc_type": "x", "exc_module": "m" * 10_000}, {"exc_type": "x", "exc_message": {"a": 1}}, 5, None,
    ],
)  # fmt: skip
def test_whatever_describes_an_exception_an_exception_comes_of_it(found: Any) -> None:
    assert isinstance(exception_from_dict(found), BaseException)


def test_no_module_imports_what_a_result_says() -> None:
    """Modules may have a __getattr__ that imports: this package has one, and large libraries do."""
    module = types.ModuleType("lazy_for_results")
    asked: list[str] = []
    module.__getattr__ = asked.append  # type: ignore[method-assign]
    sys.modules[module.__name__] = module
    try:
        error = exception_from_dict(
            {"exc_type": "submodule.Thing", "exc_module": module.__name__, "exc_message": ["x"]}
        )
    finally:
        del sys.modules[module.__name__]

    assert (asked, type(error).__name__, error.args) == ([], "Thing", ("x",))


def test_long_names_of_exceptions_are_not_kept() -> None:
    kinds = {type(exception_from_dict({"exc_type": "N" * 1_000 + str(n), "exc_message": []})) for n in range(3)}

    assert len(kinds) == 1
    assert len(kinds.pop().__name__) < 1_000
