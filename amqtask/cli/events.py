"""`amqtask events`: look on while a cluster works."""

from __future__ import annotations

import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from amqtask import states
from amqtask.cli import daemon
from amqtask.cli.base import Globals, echo, json_option, print_json, signals_to
from amqtask.exceptions import AmqTaskError
from amqtask.ground.plugins import load_path
from amqtask.ground.printable import printable

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.events.client import EventReceiver
    from amqtask.events.snapshot import Polaroid
    from amqtask.events.state import State, Task, Worker
    from amqtask.ground.shapes import EventDict


# -- What the terminal view of `amqtask events` shows: lines of text from a state, and nothing about terminals.

# In the order of a task's life; states of one's own follow.
COUNTED = (states.PENDING, states.RECEIVED, states.STARTED, states.RETRY, states.SUCCESS, states.FAILURE,
           states.REVOKED, states.REJECTED)  # fmt: skip
# Seconds over which the rate of events is taken.
RATE_OVER = 5.0
QUIET = "(no task events yet; workers without -E send none: amqtask control enable_events)"


class Screen:
    """`lines(width, height)` is the present picture."""

    def __init__(self, state: State, broker: str, *, clock: Callable[[], float] = time.time) -> None:
        self._state = state
        self._broker = broker
        self._clock = clock
        self._samples: list[tuple[float, int]] = []

    def lines(self, width: int, height: int) -> list[str]:
        """At most `height` lines of at most `width` characters."""
        all_lines = self._state.freeze_while(lambda: list(self._all_lines(height)))
        return [printable(line)[:width] for line in all_lines[:height]]

    def _all_lines(self, height: int) -> Iterator[str]:
        state, now = self._state, self._clock()
        yield (
            f"amqtask events   {self._broker}   {time.strftime('%H:%M:%S', time.localtime(now))}"
            f"   {state.event_count} events, {self._rate(now):.0f}/s   (Ctrl-C ends)"
        )
        yield ""
        workers = sorted(state.workers.values(), key=lambda worker: worker.hostname)
        # Many workers must not push the tasks off the screen.
        room = max(1, height // 3)
        yield f"{'WORKER':<32} {'STATUS':<8} {'ACTIVE':>6} {'PROCESSED':>10}  {'LOAD':<18} HEARD"
        for worker in workers[:room]:
            yield _worker_line(worker, now)
        if len(workers) > room:
            yield f"… and {len(workers) - room} more"
        yield ""
        counts = Counter(task.state for task in state.tasks.values())
        custom_states = sorted(set(counts) - set(COUNTED))
        yield "TASKS  " + "  ".join(f"{name} {counts[name]}" for name in (*COUNTED, *custom_states))
        yield ""
        if not state.tasks:
            yield QUIET
            return
        yield f"{'TIME':<9} {'STATE':<9} {'UUID':<36}  {'TASK':<32} {'WORKER':<24} WHAT"
        for _, task in state.tasks_by_time(limit=height):
            yield _task_line(task)

    def _rate(self, now: float) -> float:
        self._samples.append((now, self._state.event_count))
        while len(self._samples) > 2 and self._samples[0][0] < now - RATE_OVER:
            del self._samples[0]
        (since, before), (_, count) = self._samples[0], self._samples[-1]
        return max(0.0, (count - before) / (now - since)) if now > since else 0.0


def _worker_line(worker: Worker, now: float) -> str:
    loadavg: object = worker.loadavg  # anybody may have told it
    loads = loadavg if isinstance(loadavg, list) else []
    load = " ".join(f"{figure:.2f}" for figure in loads if isinstance(figure, (int, float)) and 0 <= figure < 1e6)
    heard = f"{max(0.0, now - worker.heartbeats[-1]):.0f} s ago" if worker.heartbeats else "-"
    active, processed = (_or_dash(number) for number in (worker.active, worker.processed))
    return f"{worker.hostname:<32} {worker.status_string:<8} {active:>6} {processed:>10}  {load:<18} {heard}"


def _task_line(task: Task) -> str:
    when = time.strftime("%H:%M:%S", time.localtime(task.timestamp)) if task.timestamp else "-"
    where = task.worker.hostname if task.worker is not None else task.client or "-"
    detail = task.info().get("exception") or task.info().get("result") or task.info().get("args") or ""
    return f"{when:<9} {task.state:<9} {task.uuid:<36}  {task.name or '-':<32} {where:<24} {detail}"


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


# The other screen of a terminal, with the cursor hidden; and back.
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
HOME_AND_CLEAR = "\x1b[H\x1b[2J"


@click.command("events")
@click.option("-d", "--dump", is_flag=True, help="Print each event on a line.")
@json_option
@click.option("-c", "--camera", metavar="MODULE:CLASS", help="Take snapshots with a Polaroid of yours.")
@click.option(
    "-F", "--frequency", "--freq", type=click.FloatRange(min=0.01), default=1.0, show_default=True,
    help="Seconds between snapshots, or between two looks of the terminal view.",
)  # fmt: skip
@click.option("-r", "--maxrate", metavar="RATE", help="Snapshots at most, such as 10/m.")
@click.option("-D", "--detach", is_flag=True, help="With --camera: run in the background.")
@click.option("--pidfile", type=click.Path(), help="With --camera: write the process id here.")
@click.option("--uid", help="With --camera: user to run as.")
@click.option("--gid", help="With --camera: group to run as.")
@click.option("--umask", help="With --camera: file mode mask, octal.")
@click.pass_obj
def command(
    settings: Globals,
    /,
    dump: bool,
    as_json: bool,
    camera: str | None,
    frequency: float,
    maxrate: str | None,
    **process: Any,
) -> None:
    """Show workers and tasks in the terminal, print events (--dump), or take snapshots (--camera). Ctrl-C ends it.

    Workers started without -E tell of themselves only: `amqtask control enable_events` makes them tell of tasks.
    """
    app = settings.load()
    if not app.broker.is_shared:
        raise click.ClickException("memory:// lives inside each process: the events of other processes cannot be seen")
    try:
        if camera is not None:
            camera_class = _find_camera(camera)
            daemon.become(**process)
            _snapshots(app, camera_class, frequency, maxrate)
        elif dump or as_json:
            _dump(app, as_json=as_json)
        elif sys.stdout.isatty():
            _view(app, frequency)
        else:
            raise click.UsageError("the view needs a terminal; --dump prints events on lines")
    except KeyboardInterrupt:
        pass  # that is how it is ended
    finally:
        app.close()


# -- lines


def _dump(app: AmqTask, *, as_json: bool) -> None:
    def tell(event: EventDict) -> None:
        if as_json:
            print_json(event, one_line=True)
        else:
            echo(_as_line(event))

    app.events.Receiver(handlers={"*": tell}).capture()


_SHOWN_APART = frozenset(
    {"type", "timestamp", "hostname", "uuid", "name", "local_received", "utcoffset", "pid", "clock"}
)


def _as_line(event: EventDict) -> str:
    """An event as a line: time, type, node, task, and its other fields."""
    fields = [f"{name}={value}" for name, value in event.items() if name not in _SHOWN_APART and value is not None]
    name = event.get("name")
    task = f"{name or ''}[{event['uuid']}]" if "uuid" in event else name or ""
    parts = [_when(event.get("timestamp")), str(event["type"]), str(event.get("hostname", "")), str(task), *fields]
    return printable(" ".join(part for part in parts if part))


def _when(moment: Any) -> str:
    try:
        return f"{datetime.fromtimestamp(moment):%H:%M:%S.%f}"[:-3]
    except (TypeError, ValueError, OverflowError, OSError):
        return "--:--:--.---"  # whoever sent it knows no better


# -- snapshots


def _snapshots(app: AmqTask, camera_class: type[Polaroid], frequency: float, maxrate: str | None) -> None:
    """Take snapshots until Ctrl-C or TERM, and then a last one."""
    state = app.events.State()
    with (
        signals_to(signal.default_int_handler, signal.SIGTERM),
        camera_class(state, freq=frequency, maxrate=maxrate, app=app),
    ):
        app.events.Receiver(handlers={"*": state.event}).capture()


def _find_camera(path: str) -> type[Polaroid]:
    """The class of `module:Class` or `module.Class`. Raises: ClickException."""
    try:
        if not {":", "."} & set(path):
            raise AttributeError(f"no module in {path!r}")
        camera_class: type[Polaroid] = load_path(path)
    except (ImportError, AttributeError) as error:
        raise click.ClickException(f"there is no camera {path}: {error}") from error
    return camera_class


# -- the view


def _view(app: AmqTask, frequency: float) -> None:
    """Draw the screen until Ctrl-C. Another thread receives events, so that the screen goes on while nothing happens."""
    state = app.events.State()
    receiver = app.events.Receiver(handlers={"*": state.event})
    screen = Screen(state, app.broker_name)
    listener = _Listener(receiver)
    listener.start()
    sys.stdout.write(ENTER)
    try:
        while not listener.ended.wait(frequency):
            _draw(screen)
    finally:
        sys.stdout.write(LEAVE)
        sys.stdout.flush()
        receiver.should_stop = True
        listener.join(5.0)
    if listener.error is not None:
        raise listener.error


def _draw(screen: Screen) -> None:
    width, height = shutil.get_terminal_size()
    sys.stdout.write(HOME_AND_CLEAR + "\n".join(screen.lines(width, height)))
    sys.stdout.flush()


class _Listener(threading.Thread):
    """A thread that receives events until it is stopped, or fails."""

    def __init__(self, receiver: EventReceiver) -> None:
        super().__init__(name="amqtask events", daemon=True)
        self._receiver = receiver
        self.ended = threading.Event()
        self.error: AmqTaskError | None = None

    def run(self) -> None:
        try:
            self._receiver.capture()
        except AmqTaskError as error:
            self.error = error
        finally:
            self.ended.set()
