"""What tests of several folders need."""

from __future__ import annotations

import logging
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, settings

from amqtask.log import TASK_LOGGER

# A machine with other work is no failure.
settings.register_profile("amqtask", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("amqtask")


@pytest.fixture
def loggers() -> Iterator[None]:
    """The loggers that the command line sets up are as before afterwards."""
    touched = [logging.getLogger(name) for name in (None, TASK_LOGGER, "pika", "aio_pika", "aiormq", "asyncio")]
    before = [(logger, logger.handlers[:], logger.level, logger.propagate) for logger in touched]
    yield
    logging.captureWarnings(False)
    for logger, handlers, level, propagate in before:
        for handler in logger.handlers:
            if handler not in handlers:
                handler.close()
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


@contextmanager
def full_disk(room: int = 0) -> Iterator[None]:
    """No file of this process grows beyond so many bytes, in a block: after it pytest itself may write to one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
