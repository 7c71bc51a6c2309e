"""From a host's name to its addresses, within a deadline; one that took a connection and said nothing comes last for a while.

The system's resolver has no deadline, and may hang for minutes: it runs in a thread that the end of the process does not wait
for, or in the caller's where no thread can be started (the interpreter is shutting down).

A name may have several addresses (one for each node of a cluster). Where nothing listens, a connection fails at once, and the
next address is tried; but a node that stands still takes connections. So whoever got no answer says so with `avoid`.
"""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import errno
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from amqtask.ground.deadlines import arrival

# What socket.getaddrinfo returns for one address: family, type, protocol, canonical name, address.
AddressInfo: TypeAlias = "tuple[int, int, int, str, tuple[object, ...]]"
Answer: TypeAlias = "Sequence[AddressInfo] | OSError"
# Seconds.
AVOIDED_SECONDS = 60.0
# Addresses that gave no answer, and until when they come after the others of their name.
_avoided: dict[object, float] = {}


def avoid(address: object) -> None:
    """Let this address (as sockets have it) come last for a while, among those of a name that has several."""
    now = time.monotonic()
    for each, until in list(_avoided.items()):
        if until < now:
            _avoided.pop(each, None)
    _avoided[address] = now + AVOIDED_SECONDS


def resolve(host: str, port: int, deadline: float) -> Sequence[AddressInfo]:
    """The addresses of a host, before `deadline` (monotonic seconds). Raises: OSError."""
    answers: list[Answer] = []
    # A lock for this call: it is released when there is an answer, and waiting for it is one system call.
    answered = threading.Lock()
    answered.acquire()

    def note(answer: Answer) -> None:
        answers.append(answer)
        answered.release()

    look_up_in_thread(host, port, note)
    if not answers and not answered.acquire(timeout=max(0.0, deadline - time.monotonic())):
        raise TimeoutError(errno.ETIMEDOUT, f"the name {host!r} was not resolved in time")
    answer = answers[0]
    if isinstance(answer, OSError):
        raise answer
    return answer


def look_up_in_thread(host: str, port: int, on_answer: Callable[[Answer], None]) -> None:
    """Call `on_answer` from a thread that ends with the process, even while the resolver hangs; for an IP address, from here."""

    def look_up() -> None:
        try:
            answer: Answer = _look_up(host, port)
        except OSError as error:
            answer = error
        on_answer(answer)

    if is_address(host):
        look_up()
        return
    try:
        # threading.Thread takes threading's global lock; this may be a signal handler that interrupted the holder of that lock.
        _thread.start_new_thread(look_up, ())
    except RuntimeError:
        look_up()


def is_address(host: str) -> bool:
    """Whether it is an IP address, which needs no looking up."""
    return ":" in host or host.replace(".", "").isdigit()


def as_host(address: Sequence[object]) -> str:
    """An address (as sockets have it) as text, with its zone where it has one."""
    return f"{address[0]}%{address[3]}" if len(address) > 3 and address[3] else str(address[0])


def _look_up(host: str, port: int) -> Sequence[AddressInfo]:
    # As bytes: for text Python imports its idna codec, which turns every exception that is raised meanwhile into its own.
    name = host.encode() if host.isascii() else host
    try:
        found: Sequence[AddressInfo] = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise socket.gaierror(socket.EAI_NONAME, f"{host!r} is not a name of a host: {error}") from error
    now = time.monotonic()
    return sorted(found, key=lambda candidate: _avoided.get(candidate[4], 0.0) > now)


# -- For coroutines. (asyncio looks names up in a thread that it waits for when its loop closes, for as long as that takes.)


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
