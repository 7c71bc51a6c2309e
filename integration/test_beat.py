"""beat on a real RabbitMQ: leaders that die, a state that stays, and a scheduler inside workers."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from integration.beats import APP, Beats, run
from integration.conftest import Broker
from integration.nodes import RabbitNode
from integration.workers import BeatProcess, WorkerProcess, eventually, run_cli


@pytest.fixture
def beats(broker_url: str, rabbit: Broker, tmp_path: Path) -> Iterator[Beats]:
    """One worker and two beats; their queues are deleted afterwards."""
    with ExitStack() as stack:
        found = Beats(broker_url, stack, tmp_path)
        yield found
    channel = rabbit.channel()
    for queue in (found.leader_queue, found.work_queue, f"{found.work_queue}.dead"):
        channel.queue_delete(queue)


def is_whole(beats: Beats) -> bool:
    return beats.report().is_good


def test_no_due_time_is_lost_when_the_leader_is_killed(broker_url: str) -> None:
    report = run(broker_url, seconds=12, kills=1)
    assert report.is_good, str(report)
    assert report.takeovers[0][1] < 60


def test_one_that_is_cut_off_is_followed_and_sends_nothing_more(beats: Beats) -> None:
    beats.start()
    beats.await_runs(2)
    beats.cut_leader()
    beats.await_runs(len(beats.runs) + 3)
    assert is_whole(beats), str(beats.report())


def test_what_a_leader_sent_unconfirmed_is_sent_again_under_the_same_id(beats: Beats) -> None:
    beats.start()
    beats.await_runs(2)
    beats.lose_confirm()
    beats.await_runs(len(beats.runs) + 3)
    report = beats.report()
    assert report.is_good, str(report)
    assert [len(ids) for ids in report.duplicates.values()] == [2]


def test_a_beat_that_stops_hands_over_at_once_and_one_that_starts_later_goes_on(beats: Beats) -> None:
    beats.start()
    beats.await_runs(2)
    for _ in range(2):
        leader = beats.await_leader()
        assert leader[0].stop() == 0
        beats.beats.remove(leader)
    beats.add()
    beats.await_runs(len(beats.runs) + 3)
    assert is_whole(beats), str(beats.report())
    assert not beats.report().duplicates


def test_after_the_queue_was_deleted_the_schedule_goes_on(beats: Beats, rabbit: Broker) -> None:
    beats.start()
    beats.await_runs(2)
    rabbit.channel().queue_delete(beats.leader_queue)
    beats.await_runs(len(beats.runs) + 3)
    assert is_whole(beats), str(beats.report())


def test_connections_that_the_broker_closes_cost_no_due_time(beats: Beats) -> None:
    beats.start()
    beats.await_runs(2)
    for _, road in beats.beats:
        road.cut()
    beats.await_runs(len(beats.runs) + 3)
    assert is_whole(beats), str(beats.report())


def test_a_paused_entry_is_sent_by_no_beat_whatever_restarts(beats: Beats, broker_url: str) -> None:
    environment = {**beats.environment, "AMQTASK_BROKER_URL": broker_url}

    def command(*words: str) -> str:
        code, printed = run_cli("-A", APP, "beat", *words, environment=environment)
        assert code == 0, printed
        return printed

    def knows(number: int, what: str = "every second is paused") -> bool:
        return sum(beat.log.count(what) for beat, _ in beats.beats) == number

    beats.start()
    beats.await_runs(2)
    assert "is paused" in command("--pause", "every second")
    eventually(lambda: knows(1))
    since = datetime.now(timezone.utc)
    leader = beats.await_leader()
    leader[0].signal(signal.SIGKILL)
    beats.beats.remove(leader)
    eventually(lambda: knows(1))
    assert "(paused by" in command("--list")
    # A due time goes by.
    eventually(lambda: datetime.now(timezone.utc) - since > timedelta(seconds=2))
    until = datetime.now(timezone.utc)
    command("--resume", "every second")
    beats.await_runs(len(beats.runs) + 2)
    assert [due for due in beats.runs if since < due < until] == []


def test_a_broker_that_is_killed_and_comes_back_costs_no_due_time(hurt_node: RabbitNode, tmp_path: Path) -> None:
    with ExitStack() as stack:
        beats = Beats(hurt_node.url, stack, tmp_path)
        environment = {**beats.environment, "AMQTASK_BROKER_URL": hurt_node.url}
        stack.enter_context(WorkerProcess(APP, "-P", "solo", environment=environment))
        for number in range(2):
            stack.enter_context(BeatProcess(APP, "-s", str(tmp_path / f"last{number}"), environment=environment))
        beats.await_runs(2)
        hurt_node.settle()
        hurt_node.kill()
        hurt_node.start()
        beats.await_runs(len(beats.runs) + 3)
        assert is_whole(beats), str(beats.report())


@pytest.mark.parametrize("pool", ["prefork", "eventlet"])
def test_every_worker_may_have_a_beat_inside(beats: Beats, broker_url: str, tmp_path: Path, pool: str) -> None:
    environment = {**beats.environment, "AMQTASK_BROKER_URL": broker_url}
    with ExitStack() as stack:
        workers = [
            stack.enter_context(
                WorkerProcess(
                    APP, "-P", pool, "-c", "1", "-n", f"w{number}@%h", "-B", "-s", str(tmp_path / f"last{number}"),
                    environment=environment,
                )
            )
            for number in range(2)
        ]  # fmt: skip
        beats.await_runs(3)
        leading = next(worker for worker in workers if "beat: leading" in worker.log)
        leading.kill()
        beats.await_runs(len(beats.runs) + 3)
        report = beats.report()
        assert not report.missing, str(report)
        assert not report.confused, str(report)
        workers.remove(leading)
        assert workers[0].stop() == 0


def test_a_beat_that_was_away_sends_one_run_and_says_when_it_ran_last(
    broker_url: str, rabbit: Broker, tmp_path: Path
) -> None:
    """The state in the broker says that it last ran long ago."""
    beats = Beats(broker_url, ExitStack(), tmp_path)
    environment = {**beats.environment, "AMQTASK_BROKER_URL": broker_url}
    arguments = ("-s", str(tmp_path / "last"))
    with BeatProcess(APP, *arguments, environment=environment) as beat:
        beat.await_log("Sending due task")
        assert beat.stop() == 0
    before = rabbit.count(beats.work_queue)
    _age(rabbit, beats.leader_queue, timedelta(days=3))
    (tmp_path / "last.sqlite3").unlink()

    with BeatProcess(APP, *arguments, environment=environment) as beat:
        eventually(lambda: rabbit.count(beats.work_queue) > before)
        first = re.search(r"Sending due task every second \(beaten.tick\), due at", beat.log)
        assert first is not None, beat.log
        assert beat.stop() == 0
    # One for three days, and one for each second that this beat has run.
    assert rabbit.count(beats.work_queue) - before < 1000
    code, listed = run_cli("-A", APP, "beat", "--list", *arguments, environment=environment)
    assert code == 0
    assert re.search(rf"every second +beaten.tick +freq: 1.00 second +{datetime.now().year}-", listed)
    for queue in (beats.leader_queue, beats.work_queue):
        rabbit.channel().queue_delete(queue)


def _age(broker: Broker, queue: str, by: timedelta) -> None:
    """A queue with a single active consumer answers no basic.get."""
    channel = broker.channel()
    method, properties, body = next(channel.consume(queue, inactivity_timeout=90))
    assert method is not None, "no state in the queue"
    moment = re.search(r"\d{4}-[0-9T:.+-]+", body.decode())
    assert moment is not None
    aged = body.decode().replace(moment[0], (datetime.fromisoformat(moment[0]) - by).isoformat())
    channel.basic_publish("", queue, aged.encode(), properties)
    channel.basic_ack(method.delivery_tag)
    channel.cancel()
    channel.close()


def test_what_cannot_start_says_why(broker_url: str, tmp_path: Path) -> None:
    environment = {"AMQTASK_BROKER_URL": broker_url}
    code, output = run_cli("-A", APP, "beat", "-s", str(tmp_path / "no" / "folder"), environment=environment)
    assert code == 1
    assert "cannot be used" in output
    code, output = run_cli("-A", APP, "-b", broker_url.replace("guest:guest", "guest:wrong"), "beat", "-S", "memory")
    assert code == 1
    assert "refused" in output


def test_beat_answers_ping_and_nothing_else(broker_url: str, tmp_path: Path) -> None:
    environment = {"AMQTASK_BROKER_URL": broker_url, "BEATS_FILE": str(tmp_path / "runs")}
    arguments = ("-S", "memory", "--enable-remote-control", "-n", "beat1@here")
    with BeatProcess(APP, *arguments, environment=environment) as beat:
        eventually(lambda: run_cli("-A", APP, "inspect", "ping", "-d", "beat1@here", environment=environment)[0] == 0)
        code, output = run_cli("-A", APP, "inspect", "active", "-d", "beat1@here", "-t", "1", environment=environment)
        assert code == 69, output
        with BeatProcess(APP, *arguments, environment=environment) as second:
            second.await_log("another beat of that name")
            assert second.stop() == 0
        assert beat.stop() == 0


def test_beat_runs_in_the_background_with_its_pid_file(broker_url: str, tmp_path: Path) -> None:
    pidfile, logfile = tmp_path / "beat.pid", tmp_path / "beat.log"
    environment = {"AMQTASK_BROKER_URL": broker_url, "BEATS_FILE": str(tmp_path / "runs")}
    arguments = (
        "beat",
        "-D",
        "--pidfile",
        str(pidfile),
        "-f",
        str(logfile),
        "-l",
        "info",
        "-s",
        str(tmp_path / "last"),
    )
    code, output = run_cli("-A", APP, *arguments, environment=environment)
    assert code == 0, output
    eventually(lambda: logfile.exists() and "beat: leading" in logfile.read_text())
    pid = int(pidfile.read_text())
    try:
        code, output = run_cli("-A", APP, *arguments, environment=environment)
        assert code == 2
        assert str(pid) in output
    finally:
        os.kill(pid, signal.SIGTERM)
    eventually(lambda: not pidfile.exists())
    assert "Shutting down" in logfile.read_text()
