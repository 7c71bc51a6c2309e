"""`amqtask beat --list`, `--dry-run`, and the options of beat and `worker -B`."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from amqtask import AmqTask, crontab
from amqtask.cli.base import Globals
from amqtask.cli.main import cli
from amqtask.cli.worker import command as worker

SCHEDULE = {
    "often": {"task": "tasks.tick", "schedule": timedelta(minutes=10), "args": ("a",), "kwargs": {"n": 1}},
    "daily": {"task": "tasks.tick", "schedule": crontab(0, 4), "options": {"queue": "far"}},
    "off": {"task": "tasks.tick", "schedule": 1, "enabled": False},
}


def amqtask(*arguments: str, schedule: object = SCHEDULE) -> Result:
    app = AmqTask("tasks", broker="memory://", set_as_current=False, beat_schedule=schedule, timezone="Asia/Shanghai")
    return CliRunner().invoke(cli, list(arguments), obj=Globals(loaded=app))


def test_list_shows_entries_with_their_next_runs(tmp_path: Path) -> None:
    done = amqtask("beat", "--list", "-s", str(tmp_path / "last"))
    assert done.exit_code == 0
    lines = {line.split()[0]: line for line in done.output.splitlines()}
    assert "freq: 10.00 minutes" in lines["often"]
    assert "04:00:00+0800" in lines["daily"]
    assert "disabled" in lines["off"]


def test_list_as_json_has_everything(tmp_path: Path) -> None:
    done = amqtask("beat", "--list", "--json", "-s", str(tmp_path / "last"))
    rows = {row["name"]: row for row in json.loads(done.output)}
    assert rows["often"]["args"] == ["a"]
    assert rows["often"]["kwargs"] == {"n": 1}
    assert rows["daily"]["options"] == {"queue": "far"}
    assert rows["daily"]["next_due_at"].endswith("20:00:00+00:00")
    assert rows["off"]["next_due_at"] is None


def test_dry_run_prints_what_would_be_sent_and_sends_nothing(tmp_path: Path) -> None:
    done = amqtask("beat", "--dry-run", "24h", "-s", str(tmp_path / "last"))
    lines = done.output.splitlines()
    assert sum("often  tasks.tick('a', n=1)" in line for line in lines) == 144
    assert sum("daily  tasks.tick()" in line for line in lines) == 1
    assert lines == sorted(lines)
    assert list(tmp_path.iterdir()) == []


def test_dry_run_as_json_is_a_line_for_each(tmp_path: Path) -> None:
    done = amqtask("beat", "--dry-run", "30m", "--json", "-s", str(tmp_path / "last"))
    rows = [json.loads(line) for line in done.output.splitlines()]
    assert [row["name"] for row in rows if row["name"] == "often"] == ["often"] * 3


@pytest.mark.parametrize("span", ["", "soon", "-1h", "0", "3x"])
def test_a_span_that_is_none_is_an_error(span: str) -> None:
    done = amqtask("beat", "--dry-run", span)
    assert done.exit_code == 2
    assert "is not a duration" in done.output


def test_a_schedule_store_that_is_not_there_is_an_error() -> None:
    done = amqtask("beat", "--list", "-S", "nothing")
    assert done.exit_code == 1
    assert "no schedule store 'nothing'" in str(done.exception)


def test_a_worker_takes_the_schedulers_options_only_with_it() -> None:
    done = CliRunner().invoke(worker, ["--scheduler", "memory"], obj=Globals())
    assert done.exit_code == 2
    assert "say -B too" in done.output
