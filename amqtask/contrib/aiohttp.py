"""An application beside an aiohttp service: `web_app.cleanup_ctx.append(cleanup_ctx(app))`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from amqtask.app import AmqTask
from amqtask.contrib.asgi import connected


def cleanup_ctx(app: AmqTask, *, must_connect: bool = True) -> Callable[[object], AsyncIterator[None]]:
    """Connected when the service starts, closed when it ends; see `amqtask.contrib.asgi.connected`."""

    async def lives(_service: object) -> AsyncIterator[None]:
        async with connected(app, must_connect=must_connect):
            yield

    return lives
