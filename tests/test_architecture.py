"""docs/architecture.md is true: the files are there, calls and results come by those that it names, and its rows are those that
import-linter judges."""

from __future__ import annotations

import configparser
import gc
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

from amqtask import AmqTask
from amqtask.protocol.result import ResultMessage

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/architecture.md").read_text()


def test_each_file_that_the_page_names_is_there() -> None:
    paths = set(re.findall(r"`((?:amqtask|pools)/[\w/.]+)`", PAGE))

    assert len(paths) > 50
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_a_call_comes_by_the_files_that_the_page_names() -> None:
    app = AmqTask("walk", broker="memory://")

    @app.task(name="add")
    def add(x: int, y: int) -> int:
        return x + y

    for _ in range(2):  # connects; one more, since the first message to an exchange or queue brings declarations
        add.delay(4, 4)

    with app:
        assert opened(lambda: add.delay(4, 4)) == named("The life of a call", 12, besides={"amqtask/pipeline.py"})


def test_a_result_comes_by_the_files_that_the_page_names() -> None:
    app = AmqTask("walk", broker="memory://", backend="rpc://")

    @app.task(name="add")
    def add(x: int, y: int) -> int:
        return x + y

    def answered() -> Any:
        result = add.delay(4, 4)
        backend: Any = app.backend
        message = backend.message_for(ResultMessage(result.id, "SUCCESS", 8), backend.reply_to(), result.id)
        app.publisher.publish(message)
        return result

    with app:
        answered().get(timeout=30)
        result = answered()
        files = opened(lambda: result.get(timeout=30))

    assert result.result == 8
    assert files == named("The life of a result", 9)


def test_the_drawing_has_the_rows_that_are_judged() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    judged = config["importlinter:contract:layers"]["layers"].replace("amqtask.", "").split("\n")
    drawing = PAGE[PAGE.index("```") : PAGE.index("```", PAGE.index("```") + 3)].splitlines()[1:]

    rows = [{name.strip() for name in row.split("|")} - {"utils"} for row in judged if row]
    assert len(drawing) == len(rows)
    assert [sorted(row) for row, line in zip(rows, drawing, strict=True) if not row <= set(line.split())] == []


def opened(work: Callable[[], object]) -> set[str]:
    """Our files in which something is called; the memory broker stands for a real one."""
    files: set[str] = set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            files.add(frame.f_code.co_filename)

    before = sys.getprofile()
    gc.collect()  # or what others have left ends in between
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(before)
    ours = {str(Path(file).relative_to(ROOT)) for file in files if file.startswith(str(ROOT / "amqtask"))}
    return {file for file in ours if not file.startswith("amqtask/transport/memory/")}


def named(section: str, count: int, besides: Iterable[str] = ()) -> set[str]:
    """The files of a walk, which are so many; `besides` are named, and not opened by each."""
    text = PAGE[PAGE.index(f"## {section}\n") :].split("\n\n")
    steps = next(part for part in text if part.startswith("1. "))
    files = set(re.findall(r"`(amqtask/[\w/.]+)`", steps)) - {*besides}
    assert len(files) == count
    return files
