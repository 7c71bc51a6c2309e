"""How long a tenant's calls wait beside another's backlog, and a queue's beside long tasks: two plots and two tables for
docs/flow-control.md.

    python -m integration.nodes run -- python -m benchmarks.fairness [--backlog 100000] [--calls 1000] [--seconds 20]

The backlog is published before the worker starts, so the time of a run is that since the first one.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from benchmarks.measure import ROOT, worker

APP = "benchmarks.apps.bench_fair"
PAGE = ROOT / "docs" / "flow-control.md"
IMAGES = ROOT / "docs" / "images"
# Slots of the worker; of them those that are kept for the short tasks; seconds between two calls of these.
SLOTS, RESERVED, EVERY = 4, 1, 0.05
# Seconds that a measurement may take; points of a line that are drawn.
LONGEST, MOST_POINTS = 600.0, 100


class Line(NamedTuple):
    """One line of a plot: its name, colour, and points."""

    name: str
    colour: str
    points: Sequence[tuple[float, float]]
    is_dashed: bool = False


# -- measuring


@contextmanager
def application(*, is_fair: bool) -> Iterator[Any]:
    """The module of the application on empty queues, with a file for its runs in BENCH_RUNS."""
    with tempfile.TemporaryDirectory(prefix="amqtask-fair-") as folder:
        environment = {"BENCH_RUNS": f"{folder}/runs", "BENCH_FAIR": "1" if is_fair else ""}
        with patch.dict(os.environ, environment):
            module: Any = importlib.reload(importlib.import_module(APP))
            forget(module)
            try:
                yield module
            finally:
                forget(module)
                module.app.close()


def forget(module: Any) -> None:
    """Delete the queues."""
    names = {queue.name for queue in module.app.queues.consumed} | {module.WEB, module.REPORTS}
    with module.app.broker.admin() as admin:
        for name in names:
            admin.delete(name)


@contextmanager
def working(*options: str) -> Iterator[subprocess.Popen[bytes]]:
    """A worker of threads."""
    command = [sys.executable, "-W", "ignore", "-m", "amqtask", "-q", "-A", APP, "worker", "-P", "threads"]
    with worker([*command, "-c", str(SLOTS), *options], {}) as process:
        yield process


def runs(module: Any, who: bytes) -> list[tuple[float, float]]:
    """When the runs of a tenant or queue began, since the first of all, and how long they had waited then (seconds)."""
    path = Path(os.environ["BENCH_RUNS"])
    found = path.read_bytes() if path.exists() else b""
    records = list(module.RECORD.iter_unpack(found[: len(found) - len(found) % module.RECORD.size]))
    first = min((began for _, began, _ in records), default=0.0)
    return sorted((began - first, began - called) for name, began, called in records if name == who)


def until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Raises: RuntimeError where it does not come."""
    deadline = time.monotonic() + LONGEST
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("the worker did not get there")
        time.sleep(0.05)


def waits_beside(backlog: int, calls: int) -> list[float]:
    """How long each of a tenant's calls waits behind, or beside, another tenant's (seconds)."""
    with application(is_fair=True) as module:
        app, serve = module.app, module.serve
        app.publish_many(serve.s("big") for _ in range(backlog))
        app.publish_many(serve.s("small") for _ in range(calls))
        with working() as process:
            until(lambda: len(runs(module, b"s")) == calls, process)
            return [began for began, _ in runs(module, b"s")]


def seconds_of_backlog(backlog: int, seconds: float) -> float:
    """How long whoever comes after such a backlog waits without `fair_by`, from what is done of it in some seconds."""
    with application(is_fair=False) as module:
        module.app.publish_many(module.serve.s("big") for _ in range(backlog))
        with working() as process:
            until(lambda: has_begun(module, backlog, seconds), process)
            begun = runs(module, b"b")
            return backlog * begun[-1][0] / len(begun)


def has_begun(module: Any, backlog: int, seconds: float) -> bool:
    """Whether all of the backlog has begun, or a part of it of so many seconds."""
    found = runs(module, b"b")
    return len(found) == backlog or bool(found and found[-1][0] > seconds)


def waits_of_pages(queues: str, seconds: float) -> list[float]:
    """How long the short tasks of one queue wait beside the long ones of another, in rising order (seconds)."""
    count = round(seconds / EVERY)
    with application(is_fair=False) as module:
        module.app.publish_many(module.report.s() for _ in range(round(seconds * SLOTS * 2)))
        with working("-Q", queues) as process:
            until(lambda: len(runs(module, b"r")) >= SLOTS - RESERVED, process)
            for _ in range(count):
                module.page.delay(time.time())
                time.sleep(EVERY)
            until(lambda: len(runs(module, b"w")) == count, process)
            return sorted(waited for _, waited in runs(module, b"w"))


# -- telling


def plot(title: str, x_title: str, y_title: str, lines: Sequence[Line]) -> str:
    """A plot as SVG, readable on light and dark pages."""
    width, height, left, top, bottom = 640, 300, 60, 40, 44
    most_x = max(x for line in lines for x, _ in line.points)
    most_y = 4 * round_step(max(y for line in lines for _, y in line.points) / 4)

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (width - left - 20) * x / most_x, height - bottom - (height - top - bottom) * y / most_y

    parts = []
    for part in range(5):
        (x, low), (_, y) = at(most_x * part / 4, 0), at(0, most_y * part / 4)
        parts.append(f'<path d="M{left} {y:.0f}H{width - 20}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.0f}" text-anchor="end">{most_y * part / 4:.3g}</text>')
        parts.append(f'<text x="{x:.0f}" y="{low + 16:.0f}" text-anchor="middle">{most_x * part / 4:,.0f}</text>')
    for number, line in enumerate(lines):
        shown = [*line.points[:: max(1, len(line.points) // MOST_POINTS)], line.points[-1]]
        path = "L".join("{:.1f} {:.1f}".format(*at(*point)) for point in shown)
        dashes = ' stroke-dasharray="5 4"' if line.is_dashed else ""
        parts.append(f'<path d="M{path}" fill="none" stroke="{line.colour}" stroke-width="2"{dashes}/>')
        parts.append(
            f'<path d="M{left + 12} {top + 14 + 17 * number}h22" stroke="{line.colour}" stroke-width="2"{dashes}/>'
        )
        parts.append(f'<text x="{left + 40}" y="{top + 18 + 17 * number}">{line.name}</text>')
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">
<title>{title}</title>
<style>text{{font:12px sans-serif;fill:#333}}</style>
<rect width="100%" height="100%" fill="#fff"/>
<text x="{left}" y="20" style="font-weight:bold">{title}</text>
{chr(10).join(parts)}
<text x="{width - 20}" y="{height - 8}" text-anchor="end">{x_title}</text>
<text x="{left}" y="{top - 6}">{y_title}</text>
</svg>
"""


def round_step(least: float) -> float:
    """The next number above that is easy to read."""
    power = 10.0 ** math.floor(math.log10(max(least, 1e-6)))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= least)


def put_table(page: str, table: Sequence[Sequence[str]]) -> str:
    """The page with the table in place of the one with the same title. Raises: ValueError where there is none."""
    rows = [f"| {' | '.join(row)} |" for row in (table[0], ["---"] * len(table[0]), *table[1:])]
    lines = page.split("\n")
    title = table[0][0].partition(" (")[0]
    start = next((number for number, line in enumerate(lines) if line.startswith(f"| {title}")), None)
    if start is None:
        raise ValueError(f"the page has no table {title!r}")
    end = next(number for number in range(start, len(lines)) if not lines[number].startswith("|"))
    return "\n".join([*lines[:start], *rows, *lines[end:]])


def quantile(values: Sequence[float], part: float) -> float:
    """Of values in rising order."""
    return values[min(len(values) - 1, int(len(values) * part))]


def fair_share(backlog: int, calls: int, seconds: float) -> tuple[str, list[list[str]]]:
    """The plot and the table of a tenant beside another one."""
    alone, beside = waits_beside(0, calls), waits_beside(backlog, calls)
    behind = seconds_of_backlog(backlog, seconds)
    numbers = range(1, calls + 1)
    drawn = plot(
        f"{calls:,} calls of a tenant beside a backlog of {backlog:,}",
        "the tenant's calls, in their order",
        "seconds that they wait",
        [
            Line("without another tenant", "#2a7de1", list(zip(numbers, alone, strict=True))),
            Line("twice that", "#999", [(number, 2 * wait) for number, wait in zip(numbers, alone, strict=True)], is_dashed=True),
            Line(f"with {backlog:,} calls of another tenant", "#d9480f", list(zip(numbers, beside, strict=True))),
        ],
    )  # fmt: skip
    table = [[f"the calls of a tenant wait ({calls:,})", "the middle one", "the last one", "more than alone"]]
    for name, found in (("alone", alone), (f"beside a backlog of {backlog:,}, `fair_by`", beside)):
        more = f"{found[-1] / alone[-1]:.2f} ×"
        table.append([name, f"{quantile(found, 0.5):.2f} s", f"{found[-1]:.2f} s", more])
    table.append(["… without `fair_by` (from its first part)", "", f"{behind:.0f} s", f"{behind / alone[-1]:.0f} ×"])
    return drawn, table


def reserved_slots(seconds: float) -> tuple[str, list[list[str]]]:
    """The plot and the table of a queue beside another one."""
    web, reports = "bench_web", "bench_reports"
    kinds: Mapping[str, tuple[str, str]] = {
        f"-Q web,reports -c {SLOTS}": (f"{web},{reports}", "#d9480f"),
        f"-Q web:{RESERVED}+,reports -c {SLOTS}": (f"{web}:{RESERVED}+,{reports}", "#2a7de1"),
    }
    lines, table = (
        [],
        [["short tasks beside reports of a second wait", "the middle one", "95 of 100 at most", "at most"]],
    )
    for name, (queues, colour) in kinds.items():
        waits = [1000 * wait for wait in waits_of_pages(queues, seconds)]
        points = [(100 * number / len(waits), wait) for number, wait in enumerate(waits)]
        lines.append(Line(name, colour, points))
        table.append(
            [f"`{name}`", *(f"{wait:.0f} ms" for wait in (quantile(waits, 0.5), quantile(waits, 0.95), waits[-1]))]
        )
    title = "Short tasks of a queue beside long ones of another"
    return plot(title, "% of the calls", "milliseconds that they wait at most", lines), table


def main() -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fairness")
    parser.add_argument("--backlog", type=int, default=100_000)
    parser.add_argument("--calls", type=int, default=1_000)
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    for name, (drawn, table) in {
        "fair-share": fair_share(options.backlog, options.calls, options.seconds),
        "reserved-slots": reserved_slots(options.seconds),
    }.items():
        (IMAGES / f"{name}.svg").write_text(drawn)
        PAGE.write_text(put_table(PAGE.read_text(), table))
        print("\n".join(" | ".join(row) for row in table), flush=True)


if __name__ == "__main__":
    main()
