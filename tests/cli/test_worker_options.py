"""Options of `amqtask worker` as environments and people give them, without a broker."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click
import pytest

from amqtask import AmqTask
from amqtask.assembly import build_worker
from amqtask.cli.daemon import check_pidfile
from amqtask.cli.main import run
from amqtask.cli.worker import command
from amqtask.ground.startup import pool_on_command_line
from amqtask.worker.options import WorkerOptions, usable_processors


def test_what_kubernetes_sets_for_a_service_is_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMQTASK_WORKER_METRICS_PORT", "tcp://10.96.0.12:9100")
    monkeypatch.setenv("AMQTASK_WORKER_HEALTH_PORT", "8080")

    with command.make_context("worker", [], auto_envvar_prefix="AMQTASK_WORKER") as context:
        assert context.params["metrics_port"] is None
        assert context.params["health_port"] == 8080


def test_a_wrong_port_on_the_command_line_is_refused() -> None:
    with pytest.raises(click.BadParameter):
        command.make_context("worker", ["--metrics-port", "tcp://10.96.0.12:9100"])


@pytest.mark.parametrize(
    ("files", "most"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
    ],
)
def test_a_container_s_quota_of_processors_is_heeded(tmp_path: Path, files: dict[str, str], most: int) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    assert 1 <= usable_processors(tmp_path) <= most


@pytest.mark.parametrize("files", [{}, {"cpu.max": "max 100000\n"}, {"cpu/cpu.cfs_quota_us": "-1\n"}])
def test_without_a_quota_all_processors_count(tmp_path: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    assert usable_processors(tmp_path) == usable_processors(tmp_path / "nowhere")


def test_spawned_children_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    app = AmqTask("tests", broker="memory://", set_as_current=False)

    assert run(["worker", "-P", "prefork", "--pool-start-method", "spawn"], app) == 2
    assert "children are forked" in capsys.readouterr().err


def test_a_log_that_cannot_be_written_is_said_before_the_worker_goes_to_the_background(
    capsys: pytest.CaptureFixture[str],
) -> None:
    app = AmqTask("tests", broker="memory://", set_as_current=False)

    assert run(["worker", "-D", "-f", "/nonexistent/worker.log"], app) == 1
    assert "the log file /nonexistent/worker.log cannot be written" in capsys.readouterr().err


def test_a_pid_file_with_our_own_number_is_a_stale_one(tmp_path: Path) -> None:
    pidfile = tmp_path / "worker.pid"
    pidfile.write_text(f"{os.getpid()}\n")
    check_pidfile(pidfile)

    assert not pidfile.exists()


def test_reloading_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "watchfiles", None)

    assert run(["worker", "--reload"]) == 1
    assert "pip install 'amqtask[reload]'" in capsys.readouterr().err


def test_reloading_is_not_for_the_background(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["worker", "--reload", "-D"]) == 2
    assert "say one of them" in capsys.readouterr().err


def test_the_process_that_watches_is_not_patched_for_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["worker", "-P", "gevent", "--reload"]
    assert pool_on_command_line(line) is None

    monkeypatch.setenv("_AMQTASK_RELOAD", "7")
    assert pool_on_command_line(line) == "gevent"


@pytest.mark.parametrize(
    ("queues", "said"),
    [
        ("reports:0,default", "-Q reports:0: after the colon comes 2"),
        ("reports:2+,default", "reports:2+ keeps 2 slots free, and there are 2, and none would be left for default"),
    ],
)
def test_slots_of_queues_that_cannot_be_are_refused(queues: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    app = AmqTask("tests", broker="memory://", set_as_current=False)

    assert run(["worker", "-c", "2", "-P", "threads", "-Q", queues], app) == 1
    assert said in capsys.readouterr().err


def test_q_and_the_setting_give_queues_slots() -> None:
    app = AmqTask("tests", broker="memory://", set_as_current=False)
    app.conf.worker_queue_slots = {"reports": 5, "web": "2+", "elsewhere": 1}

    worker = build_worker(app, WorkerOptions(queues=("reports:2", "web", "default"), concurrency=30, pool="threads"))
    worker.loop.close()

    assert [queue.name for queue in worker.queues] == ["reports", "web", "default"]
    assert {name: told["slots"] for name, told in worker.division.stats().items()} == {"reports": "2", "web": "2+"}
