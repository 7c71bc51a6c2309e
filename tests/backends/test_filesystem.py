"""Results in files keep the backends' contract, under Celery's names."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from amqtask import states
from amqtask.backends.contract import BackendOptions, ResultBackend
from amqtask.backends.filesystem import FileBackend, folder_of
from amqtask.exceptions import BackendUnreachable, ConfigurationError, EncodeError
from amqtask.protocol.result import ResultMessage
from amqtask.testing.suites.backend import BackendSuite


def backend(folder: Path, **options: Any) -> FileBackend:
    return FileBackend(BackendOptions(url=f"file://{folder}", **options))


class TestFiles(BackendSuite):
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path) -> None:
        self.path = tmp_path

    def make(self) -> ResultBackend:
        return backend(self.path)

    def make_expiring(self, seconds: float) -> ResultBackend | None:
        return backend(self.path, expires=seconds)


def test_a_file_is_named_and_filled_as_celerys(tmp_path: Path) -> None:
    store = backend(tmp_path, transport_options=(("global_keyprefix", "shop"),))

    store.store(ResultMessage("it", states.SUCCESS, 3))
    store.save_group("all", [1])

    assert json.loads((tmp_path / "shop_celery-task-meta-it").read_text())["result"] == 3
    assert json.loads((tmp_path / "shop_celery-taskset-meta-all").read_text()) == {"result": [1]}
    assert len(os.listdir(tmp_path)) == 2


def test_a_file_that_is_still_being_written_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "celery-task-meta-it").touch()

    assert backend(tmp_path).find("it") is None


def test_cleaning_up_leaves_what_is_not_ours(tmp_path: Path) -> None:
    for name in ("celery-task-meta-old", "notes.txt", ".amqtask-new-left-by-a-crash"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1, 1))

    backend(tmp_path).cleanup()

    assert os.listdir(tmp_path) == ["notes.txt"]


def test_a_task_id_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    with pytest.raises(EncodeError, match="no / in it"):
        backend(tmp_path).store(ResultMessage("/../../etc/motd", states.SUCCESS, 1))


def test_a_folder_that_goes_away_is_a_named_error(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    store = backend(folder, transport_options=(("retry_for", 0.1),))
    folder.rmdir()

    with pytest.raises(BackendUnreachable, match=str(folder)):
        store.store(ResultMessage("it", states.SUCCESS, 1))


def test_a_folder_that_is_not_there_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="make it first"):
        backend(tmp_path / "nowhere")


@pytest.mark.parametrize("url", ["file://", "file://relative/path"])
def test_a_url_must_name_a_folder(url: str) -> None:
    with pytest.raises(ConfigurationError, match="file:///an/absolute/path"):
        folder_of(url)


def test_a_url_may_name_this_host() -> None:
    assert folder_of("file://localhost/var/my%20results") == Path("/var/my results")


def test_a_task_id_that_is_no_name_of_a_file_is_an_error_of_that_task(tmp_path: Path) -> None:
    with pytest.raises(EncodeError, match="255 bytes"):
        backend(tmp_path).store(ResultMessage("x" * 250, states.SUCCESS, 1))
