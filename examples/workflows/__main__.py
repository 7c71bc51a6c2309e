"""Run it: `python -m examples.workflows` with a broker in AMQTASK_BROKER_URL (or on this machine); no result server is needed."""

from __future__ import annotations

import signal
import subprocess
import sys

from amqtask import chain, chord, group
from examples.workflows.tasks import PAGES, app, count, describe, fetch, report, tell, total

QUEUE = "workflows-example"


def compose() -> None:
    """Each of the compositions of docs/workflows.md."""
    print("chain:", (fetch.s("one") | count.s() | describe.s()).delay().get(timeout=60))
    print("group:", group(fetch.s(page) | count.s() for page in PAGES).delay().get(timeout=60))
    counted = chord([fetch.s(page) | count.s() for page in PAGES], total.s())
    print("chord:", counted.delay().get(timeout=60))
    both = group(fetch.s(page) | count.s() for page in PAGES) | total.s() | group(describe.s(), describe.s("mots"))
    print("group, task, group:", both.delay().get(timeout=60))
    print("map:", count.map(list(PAGES.values())).delay().get(timeout=60))
    print("chunks:", count.chunks([(text,) for text in PAGES.values()], 2)().get(timeout=60))
    print("replaced:", chain(report.s(["one", "two"]), describe.s()).delay().get(timeout=60))

    failing = chord([fetch.s("one"), fetch.s("four")], total.s()).on_error(tell.s())
    try:
        failing.delay().get(timeout=60)
    except KeyError as error:
        print("error:", repr(error))


def main() -> int:
    """The exit code is the worker's."""
    worker = subprocess.Popen(
        [sys.executable, "-m", "amqtask", "-q", "-A", "examples.workflows.tasks", "worker", "-Q", QUEUE, "-c", "4",
         "-P", "threads", "-l", "CRITICAL"],
        start_new_session=True,
    )  # fmt: skip
    try:
        compose()
        worker.send_signal(signal.SIGTERM)
        return worker.wait(timeout=60)
    finally:
        if worker.poll() is None:
            worker.kill()
        app.close()


if __name__ == "__main__":
    sys.exit(main())
