"""What tests of several folders need."""

from __future__ import annotations

import logging
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

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


@pytest.fixture
def no_room() -> Callable[[], AbstractContextManager[None]]:
    """Nothing can be written to a file, as on a full disk, in a block; pytest itself may write to one after it."""
    return _no_room


@contextmanager
def _no_room() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
