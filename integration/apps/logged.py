"""Tasks that log and print in every way there is."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
import warnings

from amqtask import AmqTask
from amqtask.log import get_task_logger

app = AmqTask("logged", backend="rpc://")
app.conf.worker_redirect_stdouts = "LOGGED_PRINTS" not in os.environ
logger = get_task_logger(__name__)
library = logging.getLogger("some.library")


@app.task(name="logged.talk")
def talk(word: str) -> None:
    """By a task logger, by an ordinary one, on both streams."""
    logger.info("task logger %s", word)
    time.sleep(0.01)
    library.info("library %s", word)
    print("printed", word, "in pieces")
    time.sleep(0.01)
    print("error", word, file=sys.stderr)


@app.task(name="logged.talk_async")
async def talk_async(word: str) -> None:
    """The same in a coroutine."""
    logger.info("task logger %s", word)
    await asyncio.sleep(0.01)
    library.info("library %s", word)
    print("printed", word, end=" ")
    await asyncio.sleep(0.01)
    print("in pieces")
    print("error", word, file=sys.stderr)


@app.task(name="logged.fail")
def fail() -> None:
    """With a traceback, after a warning."""
    warnings.warn("this is old", stacklevel=1)
    raise ValueError("no")
