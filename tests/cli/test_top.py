"""`amqtask top`, driven by Textual's pilot: what it shows, which keys it knows, and that nothing is shown but text."""

from __future__ import annotations

import asyncio
import fcntl
import html
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import DataTable, Sparkline, Static

from amqtask.cli.main import run
from amqtask.cli.top_screen import Top
from tests.console.test_console import EVIL, Shown

# A text of an SVG.
PLACE = re.compile(r'<text[^>]* x="([\d.]+)"[^>]*>([^<]*)</text>')
MARKUP = "[bold]x[/nothing] [@click=app.quit]\x1b[31m"


@pytest.fixture
def shown(tmp_path: Path) -> Any:
    made = Shown(tmp_path)
    yield made
    made.app.close()


def driven(top: Top, steps: Callable[[Pilot[None]], Awaitable[None]]) -> None:
    async def drive() -> None:
        async with top.run_test(size=(140, 60)) as pilot:
            await settled(top, pilot)
            await steps(pilot)

    asyncio.run(drive())


async def settled(top: Top, pilot: Pilot[None]) -> None:
    """Until the look that is under way is shown."""
    await top.workers.wait_for_complete()
    await pilot.pause()


def cells(top: Top, table: str) -> list[list[str]]:
    shown: DataTable[Any] = top.query_one(f"#{table}", DataTable)
    return [[str(cell) for cell in shown.get_row_at(index)] for index in range(shown.row_count)]


def number(top: Top, name: str) -> str:
    return str(top.query_one(f"#{name}", Static).render()).split("\n")[0]


def test_it_shows_the_first_page_and_follows(shown: Shown) -> None:
    top = Top(shown.app, interval=3600)

    async def steps(pilot: Pilot[None]) -> None:
        assert (number(top, "succeeded"), number(top, "failed"), number(top, "mean-run-time")) == ("1", "2", "500 ms")
        assert ["1", "shop.send", "ValueError"] in [row[:3] for row in cells(top, "failures")]
        assert sum(top.query_one("#bad", Sparkline).data or ()) == 2
        assert [row[0] for row in cells(top, "queues")] == ["mail"]
        assert top.sub_title == "last hour"

        shown.app.control.pauses.pause("mail", "ann")
        await pilot.press("d")
        await settled(top, pilot)
        assert top.sub_title == "last day"
        assert cells(top, "queues")[0][-1] == "by ann"
        await pilot.press("q")

    driven(top, steps)
    assert top.return_code == 0


def test_titles_stand_above_their_columns(shown: Shown) -> None:
    top = Top(shown.app, interval=3600)

    async def steps(pilot: Pilot[None]) -> None:
        await pilot.pause()
        places = {html.unescape(text).strip("\xa0"): x for x, text in PLACE.findall(top.export_screenshot())}
        assert places["ERROR"] == places["ValueError"]

    driven(top, steps)


def test_hostile_names_are_text(shown: Shown) -> None:
    shown.tell(1e9 * 1.8, "odd", "failed", name=MARKUP, exception=f"KeyError('{MARKUP}')")
    top = Top(shown.app, interval=3600)

    async def steps(pilot: Pilot[None]) -> None:
        names = [row[1] for row in cells(top, "failures")]
        assert EVIL in names
        assert any("[bold]x[/nothing]" in name and "\x1b" not in name for name in names)

    driven(top, steps)


def test_an_index_that_is_away_is_said_and_the_rest_stays(shown: Shown, tmp_path: Path) -> None:
    top = Top(shown.app, interval=3600)

    async def steps(pilot: Pilot[None]) -> None:
        problem = top.query_one("#problem", Static)
        assert not problem.display
        shown.app.history.close()
        for file in tmp_path.glob("index.sqlite3*"):
            file.unlink()
        (tmp_path / "index.sqlite3").mkdir()
        await pilot.press("r")
        await settled(top, pilot)
        assert problem.display
        assert "history" in str(problem.render())
        assert number(top, "succeeded") == "1"

    driven(top, steps)


def test_without_a_terminal_it_says_what_prints(shown: Shown, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["top"], shown.app) == 1
    assert "memory://" in capsys.readouterr().err


def test_it_ends_with_its_terminal_also_where_hang_ups_are_ignored(tmp_path: Path) -> None:
    history = f"sqlite:///{tmp_path / 'history.sqlite3'}"
    (tmp_path / "proj.py").write_text(
        f"import amqtask; app = amqtask.AmqTask(broker='amqp://127.0.0.1:1', history_url={history!r})"
    )
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "amqtask", "-A", "proj", "top"],
        stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path, start_new_session=True,
        preexec_fn=lambda: (fcntl.ioctl(theirs, termios.TIOCSCTTY, 0), signal.signal(signal.SIGHUP, signal.SIG_IGN)),
    ) as process:  # fmt: skip
        os.close(theirs)
        try:
            seen = b""
            while b"?1049h" not in seen:  # the screen
                seen += os.read(ours, 4096)
            os.close(ours)
            code = process.wait(timeout=60)
        finally:
            process.kill()

    assert code == -signal.SIGHUP
