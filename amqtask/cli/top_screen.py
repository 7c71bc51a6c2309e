"""The screen of `amqtask top` (Textual). Names and errors are shown as text: nothing of them is markup or an escape sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.widgets import DataTable, Footer, Header, Label, Sparkline, Static
from textual.worker import get_current_worker

from amqtask.console import pages
from amqtask.console.overview import overview
from amqtask.exceptions import AmqTaskError
from amqtask.ground.printable import duration, local_time, printable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from amqtask.app import AmqTask
    from amqtask.ground.shapes import JsonObject

NUMBERS = ("succeeded", "failed", "retried", "sent", "mean run time")
_SPANS = {1: "last hour", 24: "last day", 168: "last week"}
# Of a name or an error.
_LONGEST = 120


def as_text(value: object, style: str = "") -> Text:
    """A value for a cell, whatever it holds."""
    return Text("" if value is None else printable(str(value), _LONGEST), style=style)


class Top(App[None]):
    """Looks every `interval` seconds, in a thread; `hours` is how far back."""

    CSS = """
    #numbers { height: 3; } #numbers Static { width: 1fr; content-align: center middle; }
    Sparkline { height: 3; margin: 0 1; } #bad { height: 2; }
    #good > .sparkline--max-color, #good > .sparkline--min-color { color: $success; }
    #bad > .sparkline--max-color, #bad > .sparkline--min-color { color: $error; }
    DataTable { height: auto; max-height: 12; } #problem { color: $error; height: auto; display: none; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("h", "span(1)", "Hour"),
        Binding("d", "span(24)", "Day"),
        Binding("w", "span(168)", "Week"),
        Binding("r", "look", "Look now"),
        Binding("q", "quit", "Quit"),
    ]
    ENABLE_COMMAND_PALETTE = False

    def __init__(self, app: AmqTask, *, interval: float = 2.0, hours: int = 1) -> None:
        super().__init__()
        self._amqtask = app
        self._interval = interval
        self._hours = hours
        self.title = printable(app.main or "amqtask", 40)

    def compose(self) -> ComposeResult:
        """The widgets, from the top."""
        yield Header()
        yield Static("", id="problem", markup=False)
        with VerticalScroll():
            with Horizontal(id="numbers"):
                for name in NUMBERS:
                    yield Static("", id=name.replace(" ", "-"), markup=False)
            yield Sparkline([], summary_function=max, id="good")
            yield Sparkline([], summary_function=max, id="bad")
            for name, columns in (
                ("Failures", ("COUNT", "TASK", "ERROR", "LAST", "")),
                ("Queues", ("QUEUE", "READY", "CONSUMERS", "DEAD", "PAUSED")),
                ("Workers", ("STATE", "WORKER", "SOFTWARE", "RUNNING", "DONE", "LAST HEARD")),
            ):
                yield Label(name)
                table: DataTable[Text] = DataTable(id=name.lower(), cursor_type="none", zebra_stripes=True)
                table.add_columns(*columns)
                yield table
        yield Footer()

    def on_mount(self) -> None:
        """Look now and again."""
        self.action_look()
        self.set_interval(self._interval, self.action_look)

    def action_span(self, hours: int) -> None:
        """Look back so many hours."""
        self._hours = hours
        self.action_look()

    def action_look(self) -> None:
        """Look in a thread. One look at a time: a slow one is waited for, and not overtaken."""
        if not any(worker.group == "look" and not worker.is_finished for worker in self.workers):
            self.run_worker(self._look, thread=True, group="look")

    def _look(self) -> None:
        hours, worker = self._hours, get_current_worker()
        snapshot: JsonObject | None = None
        try:
            snapshot = overview(self._amqtask, hours)
            snapshot["queues"] = pages.queues(self._amqtask)["queues"]
            problem = ""
        except AmqTaskError as error:
            problem = str(error)
        if not worker.is_cancelled:
            self.call_from_thread(self._show, snapshot, problem, hours)

    def _show(self, snapshot: JsonObject | None, problem: str, hours: int) -> None:
        line = self.query_one("#problem", Static)
        line.display = bool(problem)
        line.update(as_text(problem))
        if hours != self._hours:
            self.action_look()  # somebody has asked for other hours meanwhile
        if snapshot is None:
            return
        self.sub_title = _SPANS.get(hours, f"last {hours} hours")
        for name in NUMBERS:
            value = duration(snapshot["runtime"]) or "–" if name == "mean run time" else f"{snapshot[name]:,}"
            style = "bold red" if name == "failed" and snapshot["failed"] else "bold"
            self.query_one(f"#{name.replace(' ', '-')}", Static).update(Text.assemble((value, style), f"\n{name}"))
        self.query_one("#good", Sparkline).data = [float(bar["succeeded"]) for bar in snapshot["plot"]]
        self.query_one("#bad", Sparkline).data = [float(bar["failed"]) for bar in snapshot.get("plot", ())]
        if "queues" in snapshot:
            self._fill("queues", map(_queue, snapshot["queues"]))
        self._fill("failures", map(_failure, snapshot["failures"]))
        self._fill("workers", map(_worker, snapshot["workers"]))

    def _fill(self, name: str, rows: Iterable[list[Text]]) -> None:
        table: DataTable[Text] = self.query_one(f"#{name}", DataTable)
        table.clear()
        for row in rows:
            table.add_row(*row)
        # Columns get their width when the table is idle next, and the titles are not drawn anew for that.
        self.call_after_refresh(table.refresh)


def _failure(group: JsonObject) -> list[Text]:
    status = "" if group["unseen"] else "seen"
    return [*map(as_text, (group["count"], group["name"], group["error"], local_time(group["last"]), status))]


def _queue(row: JsonObject) -> list[Text]:
    paused = row["paused"] and f"by {row['paused']['by']}"
    dead = as_text(row["dead"], "red" if row["dead"] else "")
    return [*map(as_text, (row["queue"], row["ready"], row["consumers"])), dead, as_text(paused or None, "yellow")]


def _worker(worker: JsonObject) -> list[Text]:
    state, style = ("gone", "red") if worker["is_gone"] else ("there", "green") if worker["is_online"] else ("left", "")
    values = (worker[name] for name in ("hostname", "software", "active", "processed"))
    return [as_text(state, style), *map(as_text, values), as_text(local_time(worker["last_heard"]))]
