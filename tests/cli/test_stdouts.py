"""What is printed becomes log lines of the task that printed it."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from amqtask.cli.logs import redirected
from amqtask.exceptions import ConfigurationError
from amqtask.execution.context import Context, current
from amqtask.log import TaskFields


class Lines(logging.Handler):
    """Level, task id and text of each record."""

    def __init__(self) -> None:
        super().__init__()
        self.addFilter(TaskFields())
        self.seen: list[tuple[str, str | None, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append((record.levelname, getattr(record, "task_id", None), record.getMessage()))

    @property
    def texts(self) -> list[str]:
        return [text for _, _, text in self.seen]


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler, logger = Lines(), logging.getLogger("amqtask.redirected")
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.removeHandler(handler)
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


def test_a_print_is_one_line_however_many_pieces_it_is_written_in(lines: Lines) -> None:
    with redirected("WARNING"):
        print("a", 1, "b")
        print("two\nlines")
        sys.stderr.write("error\n")
        print()

    assert lines.seen == [
        ("WARNING", None, "a 1 b"), ("WARNING", None, "two"), ("WARNING", None, "lines"), ("WARNING", None, "error")
    ]  # fmt: skip


def test_a_line_is_of_the_task_that_printed_it(lines: Lines) -> None:
    with redirected(logging.INFO):
        for task_id in ("a", "b"):
            token = current.set(Context(id=task_id, task="t"))
            print("begin", task_id)
            print("unfinished", end="")
            current.reset(token)
        print("outside")

    assert lines.seen == [
        ("INFO", "a", "begin a"),
        ("INFO", "a", "unfinished"),
        ("INFO", "b", "begin b"),
        ("INFO", "b", "unfinished"),
        ("INFO", None, "outside"),
    ]


def test_a_flush_logs_what_waits_for_its_newline(lines: Lines) -> None:
    with redirected("INFO"):
        print("50 %", end="", flush=True)
        assert lines.texts == ["50 %"]
        print(" 100 %", end="")

    assert lines.texts == ["50 %", " 100 %"]


def test_threads_do_not_mix_their_lines(lines: Lines) -> None:
    both_began = threading.Barrier(2)

    def write(name: str) -> None:
        print(name, end=" ")
        both_began.wait(60)
        print(name)

    with redirected("INFO"):
        threads = [threading.Thread(target=write, args=(name,)) for name in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert sorted(lines.texts) == ["a a", "b b"]


def test_coroutines_do_not_mix_their_lines(lines: Lines) -> None:
    async def write(name: str) -> None:
        print(name, end=" ")
        await asyncio.sleep(0)
        print(name)

    async def both() -> None:
        await asyncio.gather(write("a"), write("b"))

    with redirected("INFO"):
        asyncio.run(both())

    assert sorted(lines.texts) == ["a a", "b b"]


def test_an_endless_line_is_logged_in_pieces(lines: Lines) -> None:
    with redirected("INFO"):
        for _ in range(3):
            print("x" * 50_000, end="")

    assert "".join(lines.texts) == "x" * 150_000


def test_a_handler_that_prints_does_not_go_round_in_circles(lines: Lines, capsys: pytest.CaptureFixture[str]) -> None:
    class Chatty(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            print("handled", record.getMessage())

    logging.getLogger("amqtask.redirected").addHandler(chatty := Chatty())
    try:
        with redirected("INFO"):
            print("hello")
    finally:
        logging.getLogger("amqtask.redirected").removeHandler(chatty)

    assert lines.texts == ["hello"]
    assert capsys.readouterr().out == "handled hello\n"


def test_programs_that_a_task_starts_get_the_real_file(capfd: pytest.CaptureFixture[str]) -> None:
    with redirected("INFO"):
        subprocess.run([sys.executable, "-c", "print('child')"], stdout=sys.stdout, check=True)

    assert capfd.readouterr().out == "child\n"


def test_the_streams_are_as_before_afterwards() -> None:
    before = sys.stdout, sys.stderr
    with redirected("INFO"):
        assert sys.stdout is not before[0]

    assert (sys.stdout, sys.stderr) == before


def test_a_level_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="worker_redirect_stdouts_level is 'LOUD'"), redirected("LOUD"):
        pass
