"""`worker -B`: the scheduler on a worker's own loop."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from amqtask import AmqTask, signals
from amqtask.assembly import build_worker
from amqtask.worker.options import WorkerOptions


def test_a_worker_with_a_beat_inside_sends_and_runs(tmp_path: Path) -> None:
    ran: list[str] = []
    enough = threading.Event()
    app = AmqTask(
        "tasks",
        broker="memory://",
        set_as_current=False,
        beat_schedule={"often": {"task": "tasks.note", "schedule": 0.05, "args": ("x",)}},
    )

    @app.task(name="tasks.note", bind=True)
    def note(self: Any, word: str) -> None:
        ran.append(self.request.headers["periodic_task_name"])
        if len(ran) >= 3:
            enough.set()

    started: list[str] = []
    told = [
        signals.beat_init.connect(lambda **_: started.append("init"), weak=False),
        signals.beat_embedded_init.connect(lambda **_: started.append("embedded"), weak=False),
    ]
    options = WorkerOptions(
        pool="solo", concurrency=1, beat=True, schedule=str(tmp_path / "last"), install_signals=False, banner=False
    )
    worker = build_worker(app, options)
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        assert enough.wait(60)
    finally:
        worker.stop()
        thread.join(60)
        signals.beat_init.disconnect(told[0])
        signals.beat_embedded_init.disconnect(told[1])
    assert not thread.is_alive()
    worker.loop.close()
    assert set(ran) == {"often"}
    assert started == ["init", "embedded"]
    assert (tmp_path / "last.sqlite3").exists()
