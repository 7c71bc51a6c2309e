"""The example of docs/remote-control.md does what the page says."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from integration.conftest import Broker
from integration.workers import run_cli, run_session

PRINTED = """\
ping: {'example@here': {'ok': 'pong'}}
registered: {'example@here': ['examples.remote_control.tasks.sleep']}
active: [('examples.remote_control.tasks.sleep', [600])]
revoked: terminated
before: [{'example@here': {'prefetch_count': 2}}]
our own order: [{'example@here': {'ok': 'prefetch count incremented'}}]
after: [{'example@here': {'prefetch_count': 7}}]
pattern: [{'example@here': {'ok': 'pong'}}]
"""


@pytest.fixture
def cleaned(rabbit: Broker) -> Iterator[None]:
    """The example's queues go with the test."""
    yield
    for name in ("remote-control-example", "remote-control-example.dead"):
        rabbit.channel().queue_delete(name)


@pytest.mark.usefixtures("cleaned")
def test_the_example_prints_what_the_page_promises(broker_url: str) -> None:
    command = [sys.executable, "-m", "examples.remote_control"]

    code, printed, said = run_session(command, AMQTASK_BROKER_URL=broker_url)

    assert (printed, code) == (PRINTED, 0), said


def test_the_command_line_lists_its_commands() -> None:
    code, text = run_cli("-A", "examples.remote_control.tasks", "control", "--list")

    assert code == 0
    assert "increase_prefetch_count [N=1]" in text
    assert "Let the worker hold N more deliveries of each queue." in " ".join(text.split())
