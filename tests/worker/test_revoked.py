"""What was revoked is remembered: so much, for so long, and over a restart."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from amqtask.exceptions import ConfigurationError
from amqtask.worker.revoked import Revocations, StateFile
from tests.conftest import full_disk


def test_it_is_remembered_for_as_long_as_there_is_room() -> None:
    revoked = Revocations(max_ids=2)
    revoked.add(["a"], now=0.0)

    revoked.purge(now=1e9)

    assert revoked.covers("a", {})
    revoked.add(["b", "c"], now=1e9)
    assert list(revoked.ids) == ["b", "c"]


def test_it_is_bounded_in_number_and_age() -> None:
    revoked = Revocations(max_ids=2, expires=10.0)
    revoked.add(["a", "b", "c"], now=0.0)
    assert [revoked.covers(each, {}) for each in "abc"] == [False, True, True]

    revoked.add(["d"], now=11.0)

    assert revoked.ids == {"d": 11.0}
    revoked.add_stamps([("s", "1"), ("s", "2"), ("s", "3")], now=12.0)
    assert list(revoked.stamps) == [("s", "2"), ("s", "3")]


@pytest.mark.parametrize(
    ("headers", "is_covered"),
    [
        ({"stamped_headers": ["s"], "stamps": {"s": "x"}}, True),
        ({"stamped_headers": ["s"], "stamps": {"s": ["w", "x"]}}, True),
        ({"stamped_headers": ["s"], "stamps": {"s": 5}}, True),
        ({"stamped_headers": ["s"], "stamps": {"s": "y"}}, False),
        ({"stamped_headers": ["other"], "stamps": {"s": "x"}}, False),
        ({"stamped_headers": ["s"], "stamps": {}}, False),
        ({"stamped_headers": None, "stamps": {}}, False),
        ({"stamped_headers": ["s"], "stamps": {"s": {"no": "stamp"}}}, False),
        ({"stamped_headers": "s", "stamps": "x"}, False),
        ({}, False),
    ],
)
def test_stamps_cover_the_tasks_that_carry_them(headers: dict[str, Any], is_covered: bool) -> None:
    revoked = Revocations()
    revoked.add_stamps([("s", "x"), ("s", 5)], now=0.0)

    assert revoked.covers("any", headers) is is_covered
    assert bool(revoked)


def test_what_others_know_keeps_its_time_but_is_never_from_the_future() -> None:
    revoked = Revocations(expires=100.0)
    revoked.add(["mine"], now=1000.0)

    revoked.merge({"mine": 950.0, "theirs": 980.0, "old": 800.0, "ahead": 9999.0}, {}, now=1010.0)

    assert revoked.ids == {"theirs": 980.0, "mine": 1000.0, "ahead": 1010.0}


def test_it_survives_a_worker_that_is_killed(tmp_path: Path) -> None:
    path, revoked = tmp_path / "state", Revocations()
    file = StateFile(str(path), revoked)
    file.load()
    revoked.add(["a"], time.time())
    revoked.add_stamps([("s", "x")], time.time())

    file.save_soon()
    for thread in threading.enumerate():
        if thread.name == "amqtask-state":
            thread.join()

    found = Revocations()
    StateFile(str(path), found).load()
    assert (found.ids, found.stamps) == (revoked.ids, revoked.stamps)
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_told_once_and_leaves_no_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = StateFile(str(tmp_path / "state"), Revocations())
    file.load()

    with full_disk():
        file.save()
        file.save()

    assert not list(tmp_path.iterdir())
    assert caplog.text.count("cannot be written") == 1


def test_a_file_that_is_no_state_file_is_kept_aside_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "state"
    path.write_bytes(b"\x00GDBM of somebody else")
    revoked = Revocations()
    file = StateFile(str(path), revoked)

    file.load()

    assert "is not one of ours" in caplog.text
    (aside,) = tmp_path.iterdir()
    assert aside.read_bytes() == b"\x00GDBM of somebody else"
    revoked.add(["a"], time.time())
    file.save()
    assert list(json.loads(path.read_text())["revoked"]) == ["a"]


def test_a_file_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    path, revoked = tmp_path / "state", Revocations()
    path.write_text(json.dumps({"revoked": {"a": time.time()}}))

    StateFile(str(path), revoked).load()

    assert revoked.covers("a", {})


def test_a_file_that_could_never_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be written"):
        StateFile(str(tmp_path / "nowhere" / "state"), Revocations()).load()


def test_what_is_no_regular_file_is_refused_at_the_start_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)

    with pytest.raises(ConfigurationError, match="no regular file"):
        StateFile(str(path), Revocations()).load()

    assert path.is_fifo()


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    path, link = tmp_path / "state", tmp_path / "link"
    link.symlink_to(path)
    file = StateFile(str(link), Revocations())
    file.load()

    file.save()

    assert link.is_symlink()
    assert path.is_file()


def test_what_belongs_to_a_cancelled_tree_is_found_and_takes_no_place_of_others() -> None:
    revoked = Revocations(max_ids=3)
    revoked.add_trees(["root", "group"], 1.0)

    assert revoked.covers("root", {})
    assert revoked.covers("a", {"root_id": "root"})
    assert revoked.covers("member", {"root_id": "other", "group": "group"})
    assert revoked.covers("child", {"root_id": "other", "parent_id": "member"})
    assert not revoked.covers("b", {"root_id": "other", "parent_id": "other", "group": None})
    assert not revoked.covers("b", {"root_id": ["root"], "parent_id": 7})
    nobody = Revocations()
    nobody.add_trees([""], 1.0)
    assert not nobody.covers("without a root", {})
    revoked.add_trees(["at the beginning of time"], 0.0)
    assert revoked.covers("c", {"group": "at the beginning of time"})
    for number in range(100):
        assert revoked.covers(str(number), {"group": "group"})
        revoked.purge(2.0)
    assert list(revoked.trees) == ["root", "group", "at the beginning of time"]
