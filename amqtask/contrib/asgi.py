"""An application beside a FastAPI or Starlette service: connected when the service starts, closed when it ends.

    service = FastAPI(lifespan=lifespan(app))

or inside a lifespan of one's own: `async with connected(app): …`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from amqtask.app import AmqTask
from amqtask.exceptions import PublishError
from amqtask.ground.printable import bounded_logger

logger = bounded_logger("amqtask.publisher")


@asynccontextmanager
async def connected(app: AmqTask, *, must_connect: bool = True) -> AsyncIterator[AmqTask]:
    """Connect the application in this event loop; close it at the end of the block.

    With `must_connect=False` a broker that is away is a warning, and the first call connects. Raises: PublishError
    (BrokerUnreachable, AccessRefused …), ConfigurationError.
    """
    try:
        await app.aconnect()
    except PublishError as error:
        if must_connect:
            raise
        logger.warning("the service starts without a broker: %s", error)
    try:
        yield app
    finally:
        await app.aclose()


def lifespan(app: AmqTask, *, must_connect: bool = True) -> Callable[[object], AbstractAsyncContextManager[None]]:
    """For `FastAPI(lifespan=…)` and `Starlette(lifespan=…)`; see `connected`."""

    @asynccontextmanager
    async def lives(_service: object) -> AsyncIterator[None]:
        async with connected(app, must_connect=must_connect):
            yield

    return lives
