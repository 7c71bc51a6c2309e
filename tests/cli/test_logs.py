"""What a worker's log lines look like, inside and outside of tasks, and who may have a say in it."""

from __future__ import annotations

import json
import logging
import logging.config
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from amqtask import signals, states
from amqtask.cli.daemon import expand
from amqtask.cli.logs import LogStyle, enable_own_loggers, redirected, setup_logging
from amqtask.execution.context import Context, current
from amqtask.execution.request import Outcome, Request
from amqtask.ground.processes import POOL_INDEX
from amqtask.log import TASK_LOGGER, TaskFields, TaskFormatter, get_task_logger
from amqtask.utils.log import get_task_logger as as_in_celery
from amqtask.worker.report import Report

MODULE = "shop.orders"


pytestmark = pytest.mark.usefixtures("loggers")


@pytest.fixture
def in_task() -> Iterator[Context]:
    """A task runs."""
    context = Context(id="id1", task="shop.order")
    token = current.set(context)
    yield context
    current.reset(token)


class LogFile:
    """Logging set up to a file."""

    def __init__(self, folder: Path, *, level: str = "INFO", hijack_root: bool = True, **style: Any) -> None:
        self._path = folder / "log"
        setup_logging(level, file=str(self._path), style=LogStyle(**style), hijack_root=hijack_root)

    @property
    def lines(self) -> list[str]:
        return self._path.read_text().splitlines() if self._path.exists() else []

    @property
    def entries(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]


def test_a_line_of_the_worker_is_in_celery_s_format(tmp_path: Path) -> None:
    log = LogFile(tmp_path)
    logging.getLogger("amqtask.worker").info("ready")

    [line] = log.lines
    assert line.endswith(": INFO/MainProcess] ready")


@pytest.mark.parametrize("logger", [get_task_logger(MODULE), logging.getLogger("some.library")])
def test_a_line_that_a_task_logs_names_it_whatever_the_logger(
    tmp_path: Path, in_task: Context, logger: logging.Logger
) -> None:
    log = LogFile(tmp_path)
    logger.info("paid %d", 5)

    [line] = log.lines
    assert line.endswith(": INFO/MainProcess] shop.order[id1]: paid 5")


def test_a_task_logger_outside_of_tasks_names_none(tmp_path: Path) -> None:
    log = LogFile(tmp_path)
    get_task_logger(MODULE).info("imported")

    [line] = log.lines
    assert line.endswith("] ???[???]: imported")


def test_formats_of_one_s_own_may_name_the_task(tmp_path: Path, in_task: Context) -> None:
    log = LogFile(tmp_path, format="%(task_id)s %(message)s", task_format="%(task_name)s! %(message)s")
    logging.getLogger("some.library").info("one")
    get_task_logger(MODULE).info("two")

    assert log.lines == ["id1 one", "shop.order! two"]


def test_a_chosen_format_is_kept_to_outside_of_tasks(tmp_path: Path) -> None:
    log = LogFile(tmp_path, format="%(task_id)s %(message)s")
    logging.getLogger("some.library").info("one")

    assert log.lines == ["??? one"]


def test_json_lines_have_the_fields_in_tasks_and_only_there(tmp_path: Path, in_task: Context) -> None:
    log = LogFile(tmp_path, json_lines=True)
    logging.getLogger("some.library").info("one", extra={"order": 7})
    get_task_logger(MODULE).info("two")
    current.set(None)
    get_task_logger(MODULE).info("three")

    first, second, third = log.entries
    assert (first["task_id"], first["task_name"], first["order"]) == ("id1", "shop.order", 7)
    assert (second["task_id"], second["logger"]) == ("id1", MODULE)
    assert "task_id" not in third


def test_a_failure_has_its_parts_in_fields_of_their_own(tmp_path: Path) -> None:
    log = LogFile(tmp_path, json_lines=True, hostname="w1@h")
    trace = 'Traceback (most recent call last):\n  File "t.py", line 1, in run\nValueError: no'
    report = Report()
    request = Request(number=1, id="id1", task="shop.order", headers={}, body=b"", queue="shop")
    report.ended(request, Outcome(1, states.FAILURE, summary="ValueError('no')", traceback=trace, runtime=0.25))

    [entry] = log.entries
    assert entry["message"] == "Task shop.order[id1] raised unexpected: ValueError('no')"
    assert entry["exception"] == trace
    assert {name: entry[name] for name in ("state", "runtime", "hostname", "task_id", "task_name", "queue")} == {
        "state": "FAILURE", "runtime": 0.25, "hostname": "w1@h", "task_id": "id1", "task_name": "shop.order", "queue": "shop",
    }  # fmt: skip


def test_a_failure_s_traceback_stands_below_its_readable_line(tmp_path: Path) -> None:
    log = LogFile(tmp_path)
    request = Request(number=1, id="id1", task="shop.order", headers={}, body=b"", queue="shop")
    Report().ended(request, Outcome(1, states.FAILURE, summary="ValueError('no')", traceback="Traceback:\n  line"))

    assert [log.lines[0].partition("] ")[2], *log.lines[1:]] == [
        "Task shop.order[id1] raised unexpected: ValueError('no')",
        "    Traceback:",
        "      line",
    ]


def test_an_exception_that_was_logged_is_a_field(tmp_path: Path) -> None:
    log = LogFile(tmp_path, json_lines=True)
    try:
        raise ValueError("no")
    except ValueError:
        logging.getLogger("amqtask.worker").exception("it failed")

    [failed] = log.entries
    assert (failed["message"], failed["exception"].splitlines()[0]) == (
        "it failed",
        "Traceback (most recent call last):",
    )


def test_what_a_record_says_itself_wins(tmp_path: Path, in_task: Context) -> None:
    log = LogFile(tmp_path, json_lines=True)
    logging.getLogger("amqtask.worker").info("other", extra={"task_id": "id2", "task_name": "t"})

    assert log.entries[0]["task_id"] == "id2"


def test_a_line_of_a_task_comes_once(tmp_path: Path, in_task: Context) -> None:
    log = LogFile(tmp_path)
    get_task_logger(MODULE).info("once")
    get_task_logger(f"{MODULE}.deeper").info("and once")

    assert len(log.lines) == 2


def test_only_the_task_module_s_logger_moves_below_the_task_logger() -> None:
    logger = as_in_celery("shop2.orders.tasks")

    assert logger.parent is logging.getLogger(TASK_LOGGER)
    assert logging.getLogger("shop2.orders").parent is logging.getLogger("shop2")
    assert logging.getLogger("shop2").parent is logging.getLogger()
    assert as_in_celery("shop2.orders.tasks.more").parent is logger


@pytest.mark.parametrize("name", ["amqtask", "amqtask.task"])
def test_our_own_logger_names_are_refused(name: str) -> None:
    with pytest.raises(RuntimeError, match="amqtask's own"):
        get_task_logger(name)


def test_receivers_may_change_what_was_set_up(tmp_path: Path, in_task: Context) -> None:
    seen: list[Any] = []

    def for_all(logger: logging.Logger, loglevel: int, logfile: str, **_: Any) -> None:
        seen.append((logger, loglevel, logfile))

    def for_tasks(logger: logging.Logger, **_: Any) -> None:
        for handler in logger.handlers:
            handler.setFormatter(TaskFormatter("%(task_id)s|%(message)s", use_color=False))

    signals.after_setup_logger.connect(for_all)
    signals.after_setup_task_logger.connect(for_tasks)
    try:
        log = LogFile(tmp_path)
    finally:
        signals.after_setup_logger.disconnect(for_all)
        signals.after_setup_task_logger.disconnect(for_tasks)
    get_task_logger(MODULE).info("hello")

    assert log.lines == ["id1|hello"]
    assert seen == [(logging.getLogger(), logging.INFO, str(tmp_path / "log"))]


def test_handlers_of_the_root_logger_are_replaced_or_kept(tmp_path: Path) -> None:
    root, mine = logging.getLogger(), logging.NullHandler()
    root.handlers[:] = [mine]

    log = LogFile(tmp_path, hijack_root=False)
    logging.getLogger("some.library").warning("to mine")
    assert (root.handlers, log.lines) == ([mine], [])

    log = LogFile(tmp_path)
    logging.getLogger("some.library").warning("to the file")
    assert mine not in root.handlers
    assert len(log.lines) == 1


def test_handlers_of_one_s_own_get_the_fields_by_a_filter(in_task: Context) -> None:
    record = logging.makeLogRecord({"msg": "x"})

    assert TaskFields().filter(record)
    assert (record.task_id, record.task_name) == ("id1", "shop.order")  # type: ignore[attr-defined] # that is the point


def test_a_file_that_was_moved_away_is_made_again(tmp_path: Path) -> None:
    log = LogFile(tmp_path, format="%(message)s")
    logging.getLogger("x").info("before")
    (tmp_path / "log").rename(tmp_path / "log.1")
    logging.getLogger("x").info("after")

    assert log.lines == ["after"]
    assert (tmp_path / "log.1").read_text() == "before\n"


def test_a_log_whose_folder_is_gone_ends_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    log = LogFile(folder)
    logging.getLogger("amqtask.worker").info("before")
    folder.rename(tmp_path / "old")
    logging.getLogger("amqtask.worker").info("while it is gone")
    folder.mkdir()
    logging.getLogger("amqtask.worker").info("after")

    assert [line.rpartition("] ")[2] for line in log.lines] == ["after"]
    assert "while it is gone (not in the log file" in capfd.readouterr().err


def test_a_line_for_which_the_disk_has_no_room_is_one_line_on_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    setup_logging("INFO", file="/dev/full", style=LogStyle(format="%(message)s"))
    with redirected("WARNING"):
        logging.getLogger("amqtask.worker").info("ready")
        print("printed by a task")

    assert capfd.readouterr().err.splitlines() == [
        f"{line} (not in the log file: [Errno 28] No space left on device)" for line in ("ready", "printed by a task")
    ]


def test_what_a_handler_of_ones_own_says_of_its_server_is_told_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class ToServer(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            try:
                raise ConnectionRefusedError("no log server")
            except OSError:
                self.handleError(record)

    log = LogFile(tmp_path, format="%(message)s")
    logging.getLogger().addHandler(ToServer())
    with redirected("WARNING"):
        logging.getLogger("amqtask.worker").info("ready")

    assert log.lines == ["ready"]
    assert capfd.readouterr().err.count("ConnectionRefusedError: no log server") == 1


def test_what_is_wrong_with_a_log_call_is_in_the_log(tmp_path: Path) -> None:
    log = LogFile(tmp_path, format="%(message)s")
    with redirected("WARNING"):
        logging.getLogger("shop").info("%d orders", "no number")

    assert any(line.startswith("TypeError: %d format") for line in log.lines)


def test_a_configuration_that_turns_loggers_off_leaves_ours_on() -> None:
    logger = logging.getLogger("amqtask.worker")
    logging.config.dictConfig({"version": 1})
    assert logger.disabled

    enable_own_loggers()

    assert not logger.disabled


def test_each_process_of_a_pool_may_have_a_file_of_its_own(tmp_path: Path) -> None:
    def file_of(index: int) -> str:
        return expand(f"{tmp_path}/%n%I-%i-%%i.log", "shop@host", index)

    setup_logging("INFO", file=file_of(0), file_of=file_of)
    for index, text in ((2, "second"), (2, "again"), (0, "main")):
        POOL_INDEX[0] = index
        logging.getLogger("amqtask.worker").info(text)

    texts = {
        path.name: [line.rpartition(" ")[2] for line in path.read_text().splitlines()] for path in tmp_path.iterdir()
    }
    assert texts == {"shop-0-%i.log": ["main"], "shop-2-2-%i.log": ["second", "again"]}
