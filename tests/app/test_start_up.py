"""What is loaded when: a web process that calls tasks pays for no worker."""

from __future__ import annotations

import subprocess
import sys

CALLING = """
from amqtask import AmqTask
app = AmqTask("shop", broker="memory://")
@app.task
def add(x, y):
    return x + y
add.delay(1, 2)
"""
SHOW = "\nimport sys; print(*sorted(name for name in sys.modules if name.startswith(('amqtask', 'pika'))))"
ABOVE = ("assembly", "beat", "cli", "compat", "contrib", "plugin_table", "services", "testing", "worker")


def loaded(program: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", program + SHOW], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_the_package_alone_loads_next_to_nothing() -> None:
    names = [name for name in loaded("import amqtask") if "editable" not in name]

    assert names == ["amqtask", "amqtask.ground", "amqtask.ground.plugins"]


def test_a_program_that_calls_tasks_loads_nothing_that_stands_above_the_application() -> None:
    names = loaded(CALLING)

    assert "amqtask.app" in names
    assert not {name for name in names for part in ABOVE if f"{name}.".startswith(f"amqtask.{part}.")}
    assert not {name for name in names if name.startswith("amqtask_pools")}


def test_names_of_celery_are_found_when_they_are_asked_for() -> None:
    assert "amqtask.compat.errors" not in loaded("import amqtask.exceptions")
    assert "amqtask.compat.errors" in loaded("from amqtask.exceptions import SecurityWarning")
