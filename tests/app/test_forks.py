"""A process that is forked while other threads make their first calls."""

from __future__ import annotations

import subprocess
import sys
import textwrap

PROGRAM = """
    import importlib.abc, os, signal, sys, threading, time
    from amqtask import AmqTask

    entered = threading.Event()

    class Slow(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name == "amqtask.transport.publisher":
                entered.set()
                time.sleep(1)

    sys.meta_path.insert(0, Slow())
    app = AmqTask("forked", broker="amqp://127.0.0.1:1/")
    thread = threading.Thread(target=lambda: app.publisher)
    thread.start()
    entered.wait(60)
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        app.publisher
        os._exit(0)
    thread.join()
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_a_child_forked_while_another_thread_makes_the_publisher_has_one_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(PROGRAM)],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )

    assert done.stdout.strip() == "0", done.stderr
