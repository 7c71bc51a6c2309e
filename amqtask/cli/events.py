"""`amqtask events`: look on while a cluster works."""

from __future__ import annotations

import shutil
import signal
import sys
import threading
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from amqtask.cli import daemon
from amqtask.cli.events_screen import Screen
from amqtask.cli.globals import Globals
from amqtask.cli.output import echo, json_option, print_json
from amqtask.exceptions import AmqTaskError
from amqtask.ground.plugins import load_path
from amqtask.ground.printable import printable

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.events.receiver import EventReceiver
    from amqtask.events.snapshot import Polaroid
    from amqtask.ground.shapes import EventDict

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
    dump: bool,
    as_json: bool,
    camera: str | None,
    frequency: float,
    maxrate: str | None,
    detach: bool,
    pidfile: str | None,
    uid: str | None,
    gid: str | None,
    umask: str | None,
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
            daemon.become(pidfile=pidfile, in_background=detach, uid=uid, gid=gid, umask=umask)
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
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        state = app.events.State()
        with camera_class(state, freq=frequency, maxrate=maxrate, app=app):
            app.events.Receiver(handlers={"*": state.event}).capture()
    finally:
        signal.signal(signal.SIGTERM, before)


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
