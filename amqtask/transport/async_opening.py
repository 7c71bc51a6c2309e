"""From hosts to a `Line`: each address of each host in turn, within a deadline, with a named error."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import aio_pika
from aio_pika import exceptions as aio_errors
from aio_pika.abc import ConnectionParameter
from aiormq import exceptions as wire_errors
from pamqp import commands

from amqtask.exceptions import AccessRefused, BrokerUnreachable
from amqtask.ground.deadlines import ended
from amqtask.transport.async_line import Line, is_ours, keep_quiet
from amqtask.transport.errors import ACCESS_REFUSED, NOT_ALLOWED, NOT_OFFERED, access_refused, unreachable
from amqtask.transport.resolving import addresses_of, as_host, avoid
from amqtask.transport.url import EXTERNAL, Addresses, BrokerAddress, HostTurns, client_properties

if TYPE_CHECKING:
    from amqtask.ground.shapes import OptionDict


class _Connection(aio_pika.Connection):
    """aio-pika's connection, able to check a certificate for another name than the host's."""

    PARAMETERS = (*aio_pika.Connection.PARAMETERS, ConnectionParameter("server_hostname", str, is_kwarg=True))

    async def _on_connection_close(self, closing: asyncio.Future[object]) -> None:
        # aio-pika pauses here for callbacks, which we have none of: a loop that closes in the pause leaves a task behind.
        with contextlib.suppress(asyncio.CancelledError):
            closing.exception()
        self.connected.clear()

    def __del__(self) -> None:
        # aio-pika's __del__ begins to close: a connection that never connected has nothing to close, and without its loop it
        # only leaves a warning of a coroutine that was never awaited.
        if self.transport is not None and asyncio._get_running_loop() is self.loop:
            super().__del__()


async def connect(
    addresses: Addresses, deadline: float, *, heartbeat: int | None, connect_timeout: float, name: str
) -> Line:
    """The first of the addresses that answers before the deadline, in turn and again.

    Raises: AccessRefused at once, BrokerUnreachable.
    """
    loop = asyncio.get_running_loop()
    turns = HostTurns(addresses, deadline, connect_timeout, loop.time)
    while True:
        for address, seconds in turns:
            try:
                line = await _open(address, loop.time() + seconds, heartbeat, name)
            except AccessRefused:
                raise
            except BrokerUnreachable as error:
                turns.failed(error)
            else:
                line.has_other_hosts = len(addresses) > 1
                return line
        await asyncio.sleep(turns.pause())


async def _open(address: BrokerAddress, deadline: float, heartbeat: int | None, name: str) -> Line:
    """A line to the first of the host's addresses that answers; none has the time of those after it. Raises: AccessRefused,
    BrokerUnreachable."""
    loop = asyncio.get_running_loop()
    failure: BrokerUnreachable | None = None
    try:
        found = await addresses_of(address.host, address.port, deadline - loop.time())
    except TimeoutError:
        raise _late(address) from None
    except OSError as error:
        raise unreachable(error, [address]) from error
    for index, place in enumerate(found):
        seconds = (deadline - loop.time()) / (len(found) - index)
        opening = await ended(_open_at(place, address, heartbeat, name), seconds, Line.abandon)
        try:
            if opening is not None:
                return opening.result()
            failure = _late(address)
        except (OSError, aio_errors.AMQPError, asyncio.CancelledError) as error:
            failure = _unreachable(error, address)
        avoid(place)
    raise failure or _late(address)


def _late(address: BrokerAddress) -> BrokerUnreachable:
    return BrokerUnreachable(f"{address.safe_url} did not answer in time")


async def _open_at(place: Any, address: BrokerAddress, heartbeat: int | None, name: str) -> Line:
    is_ours.set(True)  # of this task, which is ours
    keep_quiet()
    tls = address.tls
    options: OptionDict = {"heartbeat": address.heartbeat if address.heartbeat is not None else heartbeat}
    if tls is not None:
        options["server_hostname"] = tls.server_hostname or address.host
    if address.login_method == EXTERNAL:
        options["auth"] = EXTERNAL
    connection = await aio_pika.connect(
        host=as_host(place),
        port=place[1],
        login=address.user,
        password=address.password,
        virtualhost=address.vhost,
        ssl=tls is not None,
        ssl_context=tls.context() if tls is not None else None,
        client_properties=client_properties(name),
        connection_class=_Connection,
        **options,
    )
    return Line(address, connection)


def _unreachable(error: BaseException, address: BrokerAddress) -> BrokerUnreachable:
    """Our error for a failed attempt; a refusal by the broker is raised at once."""
    closing = _closing_of_handshake(error)
    if isinstance(error, wire_errors.AuthenticationError):
        raise access_refused(address, f"{NOT_OFFERED}: {error}", is_login=True) from error
    code, text = (closing.reply_code, closing.reply_text or "") if closing is not None else (0, str(error))
    if isinstance(error, aio_errors.ProbableAuthenticationError) or code == ACCESS_REFUSED:
        raise access_refused(address, text, is_login="vhost" not in text) from error
    if code == NOT_ALLOWED and "limit" not in text:
        raise access_refused(address, text, is_login=False) from error
    return unreachable(error if closing is None else ConnectionError(f"{code} {text}"), [address])


def _closing_of_handshake(error: BaseException) -> commands.Connection.Close | None:
    """The broker's connection.close in answer to connection.open, the step that names the virtual host. aiormq reports the method
    that it expected and drops the broker's text; the frame is still in the local variables of the traceback."""
    tb = error.__traceback__
    while tb is not None:
        amqp_frame = tb.tb_frame.f_locals.get("frame")
        if isinstance(amqp_frame, commands.Connection.Close):
            return amqp_frame
        tb = tb.tb_next
    return None
