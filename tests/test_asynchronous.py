"""Errors that strike from outside are told from a function's own."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest

from amqtask.exceptions import EncodeError, Undecodable
from amqtask.protocol.serialization import dumps, is_own, loads
from amqtask.protocol.task import saferepr


class ThreadInterrupt(Exception):
    """As a soft time limit."""


class Struck:
    """Raises ThreadInterrupt once, at the first call of a function of that name in the block, as a signal handler would."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._is_over = False

    def __enter__(self) -> None:
        sys.settrace(self._trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> None:
        if not self._is_over and frame.f_code.co_name == self._name:
            self._is_over = True
            raise ThreadInterrupt


class Odd:
    """Has neither a form in JSON nor a repr of one line."""

    def __repr__(self) -> str:
        return "odd"


def test_an_error_that_comes_again_is_the_functions_own() -> None:
    assert is_own(ZeroDivisionError(), lambda: 1 / 0)
    assert not is_own(ThreadInterrupt(), lambda: None)


def test_what_strikes_while_a_value_is_written_is_not_taken_for_the_values_fault() -> None:
    with pytest.raises(ThreadInterrupt), Struck("encode"):
        dumps([1], "json")
    with pytest.raises(EncodeError):
        dumps([Odd()], "json")


def test_what_strikes_while_a_body_is_read_is_not_taken_for_the_bodys_fault() -> None:
    with pytest.raises(ThreadInterrupt), Struck("_load_json"):
        loads(b"[1]", "application/json", "utf-8", frozenset({"application/json"}))
    with pytest.raises(Undecodable):
        loads(b"[1", "application/json", "utf-8", frozenset({"application/json"}))


def test_what_strikes_in_a_repr_is_not_written_into_the_text() -> None:
    with pytest.raises(ThreadInterrupt), Struck("__repr__"):
        saferepr(Odd())
