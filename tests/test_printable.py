"""What others wrote stands in one line, and not in many."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest

import amqtask
import amqtask_pools
from amqtask.cli.logs import JsonFormatter
from amqtask.ground.printable import LONGEST, Lines, bounded_logger, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("é 漢", "é 漢"),
        ("a\nb", r"a\nb"),
        ("\x1b[2J\x9b", r"\x1b[2J\x9b"),
        ("\u202edetrevni", r"\u202edetrevni"),
        ("\ud800", r"\ud800"),
    ],
)
def test_controls_are_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_long_texts_are_cut_and_counted() -> None:
    shown = printable("\n" * 100_000)

    assert len(shown) < LONGEST + 50
    assert shown.endswith("(100000 characters)")


@pytest.fixture
def lines() -> Any:
    """What a logger of ours writes."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = bounded_logger("amqtask.tested")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    yield logger, handler, stream
    logger.removeHandler(handler)


def test_nothing_that_others_wrote_begins_a_line(lines: Any) -> None:
    logger, _, stream = lines
    forged = "x\n[2026-01-01: INFO] forged\x1b[2J"

    logger.error("%s %r %s %d %s", forged, forged, ValueError(forged), 7, {forged: forged})
    logger.error("Task raised\n%s", Lines(f"Traceback\n  File\nValueError: {forged}"))
    logger.error(forged)
    try:
        raise ValueError(forged)
    except ValueError:
        logger.exception("failed")

    text = stream.getvalue()
    assert not [line for line in text.split("\n") if line.startswith("[2026")]
    assert "\x1b" not in text
    assert "Traceback" in text


def test_no_line_is_long(lines: Any) -> None:
    logger, handler, stream = lines
    handler.setFormatter(JsonFormatter())
    long = "x" * 1_000_000

    logger.error("%s %s", long, long.split("x"))
    logger.error("%s", Lines("\n".join(["line"] * 10_000)))
    try:
        raise ValueError(long)
    except ValueError:
        logger.exception("failed")

    written = stream.getvalue().splitlines()
    assert max(map(len, written)) < 8000
    assert "ValueError" in json.loads(written[-1])["exception"]


def test_an_argument_that_cannot_be_written_is_said_so(lines: Any) -> None:
    class Hostile:
        def __str__(self) -> str:
            raise RuntimeError("no text")

    logger, _, stream = lines
    logger.error("%s", Hostile())

    assert "str() raised RuntimeError" in stream.getvalue()


# The users' own, and those whose lines are none of ours.
OTHERS = {"printable.py", "log.py", "logs.py", "names.py"}


@pytest.mark.parametrize("package", [amqtask, amqtask_pools])
def test_all_loggers_of_ours_are_bounded(package: Any) -> None:
    (folder,) = package.__path__
    found = [
        path.name
        for path in Path(folder).rglob("*.py")
        if path.name not in OTHERS and "logger = logging.getLogger(" in path.read_text()
    ]

    assert found == []
