"""Results and exceptions that nobody recorded."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from amqtask.exceptions import (
    EncodeError,
    MaxRetriesExceededError,
    TaskRevokedError,
    TimeLimitExceeded,
    Undecodable,
    WorkerLostError,
)
from amqtask.protocol.result import (
    RemoteError,
    RemoteTraceback,
    ResultMessage,
    decode_result,
    encode_result,
    exception_as_dict,
    exception_from_dict,
)
from amqtask.serialization import content_types

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


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
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


@pytest.mark.parametrize("body", [b"[]", b"{}", b"1", b'{"status": "SUCCESS"}'])
def test_what_is_no_result_is_undecodable(body: bytes) -> None:
    with pytest.raises(Undecodable):
        decode_result(body, "application/json", "utf-8", JSON)
