"""Tasks whose messages are protected, the same program under amqtask and under Celery (`PROTECTED_UNDER=celery`).

`PROTECTED` holds the settings as JSON; with `security_key` among them it signs.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

if os.environ.get("PROTECTED_UNDER") == "celery":
    from celery import Celery, chain
else:
    from amqtask import Celery, chain

settings = json.loads(os.environ["PROTECTED"])
app: Any = Celery("protected")
app.conf.update(settings)
app.conf.broker_connection_retry_on_startup = True
app.conf.broker_connection_timeout = 60
if "security_key" in settings:
    app.setup_security()


@app.task(name="protected.add")  # type: ignore[untyped-decorator, unused-ignore]
def add(x: int, y: int) -> int:
    """The one that everybody knows."""
    return x + y


@app.task(name="protected.echo")  # type: ignore[untyped-decorator, unused-ignore]
def echo(value: Any) -> Any:
    """What it is given."""
    return value


@app.task(name="protected.total")  # type: ignore[untyped-decorator, unused-ignore]
def total(values: list[int]) -> int:
    """The sum of some numbers."""
    return sum(values)


@app.task(name="protected.leave")  # type: ignore[untyped-decorator, unused-ignore]
def leave(path: str, text: str, seconds: float = 0.0) -> None:
    """Append a line to a file."""
    time.sleep(seconds)
    with Path(path).open("a") as file:
        file.write(f"{text}\n")


@app.task(name="protected.retry", bind=True, max_retries=3)  # type: ignore[untyped-decorator, unused-ignore]
def retry(self: Any, value: str, countdown: float = 0.0) -> str:
    """Fails once."""
    if not self.request.retries:
        raise self.retry(exc=RuntimeError(value), countdown=countdown)
    return value


@app.task(name="protected.fail", acks_on_failure=False)  # type: ignore[untyped-decorator, unused-ignore]
def fail(value: str) -> None:
    """An ordinary error that says what it was given; its message ends with the dead, under amqtask."""
    raise ValueError(value)


__all__ = ["add", "app", "chain", "echo", "fail", "leave", "retry", "total"]
