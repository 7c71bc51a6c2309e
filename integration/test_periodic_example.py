"""examples/periodic prints what docs/schedules.md promises."""

from __future__ import annotations

import re
import sys

from integration.conftest import Broker
from integration.workers import run_cli, run_session

PRINTED = """\
the first beat sends what is due after 0 s, 1 s, 2 s
there are two, still one sends: 3 s, 4 s
the first is killed, the second goes on: 5 s, 6 s, 7 s
"""


def test_the_example_prints_what_it_should(rabbit: Broker) -> None:
    rabbit.channel().queue_delete("periodic-example")
    rabbit.channel().queue_delete("amqtask.beat.periodic-example.periodic-example")

    code, printed, said = run_session([sys.executable, "-m", "examples.periodic"])

    assert code == 0, said
    assert printed == PRINTED


def test_its_entries_are_listed_and_tried(broker_url: str) -> None:
    code, listed = run_cli("-A", "examples.periodic.tasks", "beat", "--list", "-S", "memory")
    assert code == 0
    assert re.search(
        r"daily report +examples.periodic.tasks.report +crontab: 30 7 \* \* mon-fri .* 07:30:00\+0[12]00", listed
    )
    assert "examples.periodic.tasks.report('monthly')" in listed

    code, tried = run_cli("-A", "examples.periodic.tasks", "beat", "--dry-run", "10s", "-S", "memory", "--json")
    assert code == 0
    assert tried.count('"name": "look"') >= 10
