"""Expired results are deleted by the task that beat calls every night, where the store does not do so by itself."""

from __future__ import annotations

from pathlib import Path

from amqtask import AmqTask, states
from amqtask.protocol.result import ResultMessage

OLD, NEW = "2020-01-01T00:00:00+00:00", "2999-01-01T00:00:00+00:00"


def test_the_task_deletes_what_has_expired(tmp_path: Path) -> None:
    app = AmqTask("tidy", broker="memory://", backend=f"db+sqlite:///{tmp_path}/results.db")
    assert app.backend is not None
    for task_id, when in (("old", OLD), ("new", NEW)):
        app.backend.store(ResultMessage(task_id, states.SUCCESS, 1, date_done=when))

    app.finalize()
    app.tasks["celery.backend_cleanup"]()

    assert app.backend.find("old") is None
    assert app.backend.find("new") is not None
    app.close()


def test_results_that_never_expire_stay(tmp_path: Path) -> None:
    app = AmqTask("tidy", broker="memory://", backend=f"db+sqlite:///{tmp_path}/results.db")
    app.conf.result_expires = None
    assert app.backend is not None
    app.backend.store(ResultMessage("old", states.SUCCESS, 1, date_done=OLD))

    app.finalize()
    app.tasks["celery.backend_cleanup"]()

    assert app.backend.find("old") is not None
    app.close()
