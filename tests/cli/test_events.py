"""`amqtask events`: what its view shows, and what its lines say."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from amqtask import AmqTask
from amqtask.cli.events import QUIET, Screen, _as_line
from amqtask.cli.main import run
from amqtask.events.state import State

NOW = time.time()


def state_of(*events: dict[str, Any]) -> State:
    state = State()
    for clock, event in enumerate(events):
        state.event({"hostname": "one@h", "timestamp": NOW, "local_received": NOW, "clock": clock, **event})
    return state


def picture(state: State, width: int = 200, height: int = 40) -> str:
    return "\n".join(Screen(state, "amqp://h", clock=lambda: NOW + 1.0).lines(width, height))


def test_workers_and_tasks_are_shown() -> None:
    state = state_of(
        {"type": "worker-heartbeat", "freq": 3600.0, "active": 3, "processed": 42, "loadavg": [0.5, 0.25, 0.125]},
        {"type": "task-received", "uuid": "first", "name": "tasks.add", "args": "(1, 2)"},
        {"type": "task-failed", "uuid": "second", "exception": "ValueError('x')"},
    )

    lines = picture(state).splitlines()

    (worker,) = (line for line in lines if line.startswith("one@h"))
    assert worker.split() == ["one@h", "ONLINE", "3", "42", "0.50", "0.25", "0.12", "1", "s", "ago"]
    assert "RECEIVED 1" in picture(state)
    assert "FAILURE 1" in picture(state)
    tasks = [line.split()[1:] for line in lines if "first" in line or "second" in line]
    assert tasks == [
        ["FAILURE", "second", "-", "one@h", "ValueError('x')"],
        ["RECEIVED", "first", "tasks.add", "one@h", "(1,", "2)"],
    ]


def test_what_to_do_is_said_while_no_task_is_heard_of() -> None:
    assert QUIET in picture(state_of({"type": "worker-online", "freq": 2.0}))


def test_it_fits_the_terminal_and_many_workers_leave_room_for_tasks() -> None:
    workers = [{"type": "worker-online", "hostname": f"w{number:02}@h", "freq": 2.0} for number in range(50)]
    tasks = [{"type": "task-received", "uuid": str(number), "name": "t" * 500} for number in range(50)]

    lines = Screen(state_of(*workers, *tasks), "amqp://h").lines(80, 24)

    assert len(lines) == 24
    assert max(map(len, lines)) <= 80
    assert any("… and 43 more" in line for line in lines)
    assert sum("RECEIVED" in line for line in lines) > 5


def test_strangers_cannot_send_commands_to_the_terminal() -> None:
    shown = picture(state_of({"type": "task-received", "uuid": "\x1b[2J", "name": "\x07bell", "loadavg": 1}))

    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "\x1b" not in _as_line({"type": "\x1b]0;title", "hostname": "h"})


@pytest.mark.parametrize("loads", [[10**400], [float("nan"), float("inf")], [-1, "x", None, True], {"a": 1}])
def test_loads_that_are_none_end_no_view(loads: object) -> None:
    assert "one@h" in picture(state_of({"type": "worker-heartbeat", "freq": 3600.0, "loadavg": loads}))


def test_the_rate_of_events_is_that_of_the_last_seconds() -> None:
    now = [NOW]
    state = State()
    screen = Screen(state, "amqp://h", clock=lambda: now[0])
    assert "0 events, 0/s" in screen.lines(200, 1)[0]
    for _ in range(20):
        now[0] += 1.0
        for _ in range(7):
            state.event({"type": "custom-thing", "hostname": "h"})
        first = screen.lines(200, 1)[0]

    assert "140 events, 7/s" in first


def test_an_event_is_a_line() -> None:
    line = _as_line(
        {
            "type": "task-received", "timestamp": NOW, "hostname": "one@h", "uuid": "a", "name": "tasks.add", "clock": 7,
            "args": "(1, 2)", "eta": None, "pid": 3,
        }
    )  # fmt: skip

    assert line.split(" ", 1)[1] == "task-received one@h tasks.add[a] args=(1, 2)"
    assert _as_line({"type": "x", "timestamp": 1e300}).startswith("--:--:--")


def test_the_view_needs_a_terminal_and_a_camera_must_exist(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    app = AmqTask("looked", broker="amqp://localhost//", set_as_current=False)

    assert run(["events"], app) == 2
    assert "--dump" in capsys.readouterr().err
    assert run(["events", "--camera", "nowhere:Camera"], app) == 1
    assert "no camera nowhere:Camera" in capsys.readouterr().err


def test_memory_brokers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    app = AmqTask("looked", broker="memory://", set_as_current=False)

    assert run(["events", "--dump"], app) == 1
    assert "memory://" in capsys.readouterr().err
