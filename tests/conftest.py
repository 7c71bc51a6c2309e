"""What tests of several folders need."""

from __future__ import annotations

import logging
import resource
from collections.abc import Iterator

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
def no_room() -> Iterator[None]:
    """Nothing can be written to a file, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
