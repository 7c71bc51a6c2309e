"""PlainLoop: what its contract says about its end."""

from __future__ import annotations

import os

from amqtask.testing.loop import PlainLoop


def test_a_call_after_the_end_touches_nobody_s_descriptor() -> None:
    loop = PlainLoop()
    loop.close()
    reader, writer = os.pipe()  # gets the numbers that were the loop's
    os.set_blocking(reader, False)

    loop.call_soon_threadsafe(lambda: None)

    try:
        written = os.read(reader, 1)
    except BlockingIOError:
        written = b""
    os.close(reader)
    os.close(writer)
    assert written == b""
