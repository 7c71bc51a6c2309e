"""`resolving` for coroutines. (asyncio looks names up in a thread that it waits for when its loop closes, for as long as that
takes.)"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from typing import Any

from amqtask.ground.deadlines import arrival
from amqtask.transport.resolving import Answer, look_up_in_thread


async def addresses_of(host: str, port: int, seconds: float | None) -> list[Any]:
    """The addresses of a host, as sockets take them, within so many seconds. Raises: OSError."""
    loop = asyncio.get_running_loop()
    arriving: asyncio.Future[Answer] = loop.create_future()

    def arrived(answer: Answer) -> None:
        if not arriving.done():
            arriving.set_result(answer)

    def note(answer: Answer) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed by now
            loop.call_soon_threadsafe(arrived, answer)

    look_up_in_thread(host, port, note)
    try:
        answer = await arrival(arriving, seconds)
    except asyncio.TimeoutError:
        raise TimeoutError(errno.ETIMEDOUT, f"the name {host!r} was not resolved in time") from None
    if isinstance(answer, OSError):
        raise answer
    return [candidate[4] for candidate in answer]
