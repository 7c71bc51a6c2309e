"""What struck a call from outside is told from what went wrong on the way to a server."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator

import pytest
import redis

from amqtask import AmqTask
from amqtask.exceptions import BackendUnreachable
from amqtask.ground.strikes import let_through
from amqtask.transport.redis.lines import Line
from amqtask.transport.redis.wire import Place


class Mine(TimeoutError):
    """An alarm's."""


def _alarm(*_: object) -> None:
    raise TimeoutError("time is up")


def _own_class(*_: object) -> None:
    raise Mine


def _caught(call: Callable[[], object]) -> Exception:
    try:
        call()
    except Exception as error:
        let_through(error)
        return error
    raise AssertionError


def _refused() -> None:
    Line(Place("127.0.0.1", 1), 5.0)


def _as_redis(call: Callable[[], object]) -> Callable[[], object]:
    def convert() -> None:
        try:
            call()
        except OSError as error:
            raise redis.ConnectionError("as redis-py makes it") from error

    return convert


@pytest.mark.parametrize("convert", [lambda call: call, _as_redis])
@pytest.mark.parametrize("handler", [_alarm, _own_class])
def test_what_a_signal_handler_raises_is_let_through(
    handler: Callable[..., None], convert: Callable[[Callable[[], object]], Callable[[], object]]
) -> None:
    left, right = socket.socketpair()
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with left, right, pytest.raises(TimeoutError) as caught:
            _caught(convert(lambda: left.recv(1)))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert type(caught.value) is (Mine if handler is _own_class else TimeoutError)


def test_what_the_network_says_is_not_whatever_the_caller_was_handling() -> None:
    for call in (_refused, _as_redis(_refused)):
        assert isinstance(_caught(call), (OSError, redis.ConnectionError))
    try:
        raise Mine
    except Mine:
        assert isinstance(_caught(_refused), ConnectionRefusedError)
        assert isinstance(_caught(_as_redis(_refused)), redis.ConnectionError)


def test_an_awaited_call_and_a_generator_s_know_what_their_caller_was_handling() -> None:
    async def await_refused() -> None:
        assert isinstance(_caught(_as_redis(_refused)), redis.ConnectionError)

    async def handle() -> None:
        try:
            raise Mine
        except Mine:
            await await_refused()

    def generate() -> Iterator[Exception]:
        while True:
            yield _caught(_as_redis(_refused))

    asyncio.run(handle())
    errors = generate()
    assert isinstance(next(errors), redis.ConnectionError)
    try:
        raise Mine
    except Mine:
        assert isinstance(next(errors), redis.ConnectionError)


@pytest.mark.parametrize("host", ["ü..example", "no-such-host.invalid"])
def test_what_is_wrong_with_a_name_is_the_store_s_to_tell(host: str) -> None:
    app = AmqTask("x", broker="memory://", backend=f"redis://{host}:6379/0")

    with pytest.raises(BackendUnreachable, match="does not answer"):
        app.AsyncResult("some").get(timeout=1)
