"""What the cluster suite makes of the lines that it counts."""

from __future__ import annotations

from pathlib import Path

from integration.tally import Row, Tally

WORKS = [(100.0, 110.0), (125.0, 200.0)]


def row(folder: Path, calls: list[str], runs: list[str], **left: int) -> Row:
    (folder / "calls").write_text("".join(f"one\t{line}\n".replace(" ", "\t") for line in calls))
    (folder / "runs").write_text("".join(f"one\t{line}\n".replace(" ", "\t") for line in runs))
    return Tally(folder, "one").row("a scenario", WORKS, (100.0, 150.0), left=left)


def test_what_was_accepted_and_never_ran_is_lost(tmp_path: Path) -> None:
    found = row(
        tmp_path,
        ["plain 1 accepted 101 101 sync ", "plain 2 accepted 102 102 sync ", "plain 3 refused 103 104 sync no"],
        ["plain 1 101.5 prefork", "plain 1 101.6 eventlet"],
    )
    assert (found.accepted, found.refused, found.twice, found.lost, found.stuck) == (2, 1, 1, 1, 0)


def test_what_still_waits_in_a_queue_is_stuck(tmp_path: Path) -> None:
    found = row(tmp_path, ["plain 1 accepted 101 101 sync "], [], clustered=1)
    assert (found.lost, found.stuck) == (0, 1)


def test_a_call_that_is_refused_while_the_cluster_works_all_the_time_is_wronged(tmp_path: Path) -> None:
    found = row(tmp_path, ["plain 1 refused 101 106 sync no", "plain 2 refused 108 113 sync no"], [])
    assert (found.refused, found.wronged) == (2, 1)


def test_pauses_count_only_while_the_cluster_works(tmp_path: Path) -> None:
    runs = [f"plain {second} {second}.0 prefork" for second in (*range(100, 108), *range(129, 150))]
    calls = [f"plain {second} accepted {second} {second}.0 sync " for second in range(100, 150)]
    found = row(tmp_path, calls, runs)
    assert (found.idle, found.idle_once_back) == (2.0, 4.0)


def test_a_delayed_task_is_late_by_the_seconds_in_which_the_cluster_worked(tmp_path: Path) -> None:
    found = row(tmp_path, ["delayed 1 accepted 101 101 delayed 108"], ["delayed 1 126.5 prefork"])
    assert found.late == 3.5


def test_a_delayed_task_is_not_late_for_what_the_plain_ones_of_its_time_waited_too(tmp_path: Path) -> None:
    calls = [
        "plain 1 accepted 101 101 sync ",
        "plain 2 accepted 102 102 sync ",
        "delayed 1 accepted 90 90 delayed 101.5",
    ]
    found = row(tmp_path, calls, ["plain 1 104 prefork", "plain 2 106 prefork", "delayed 1 105.5 prefork"])
    assert (found.late, found.waited) == (1.0, 4.0)


def test_a_worker_that_nobody_gives_anything_is_not_idle(tmp_path: Path) -> None:
    calls = ["plain 1 accepted 100 100 sync ", "plain 2 accepted 108 108 sync "]
    found = row(tmp_path, calls, ["plain 1 100.5 prefork", "plain 2 109 prefork"])
    assert found.idle == 1.0
