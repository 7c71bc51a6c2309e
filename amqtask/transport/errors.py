"""pika's exceptions → ours, with what to do."""

from __future__ import annotations

from collections.abc import Sequence

from pika import exceptions as pika_errors

from amqtask.exceptions import AccessRefused, BrokerUnreachable, PublishError
from amqtask.transport.url import BrokerAddress


def unwrap(error: BaseException) -> BaseException:
    """The innermost cause that pika hides in AMQPConnectorException's arguments."""
    seen = error
    while seen.args and isinstance(seen.args[0], BaseException):
        seen = seen.args[0]
    for attribute in ("exceptions",):
        inner = getattr(seen, attribute, None)
        if inner:
            return unwrap(inner[-1])
    return seen


def is_refusal(error: BaseException) -> bool:
    """Whether trying again cannot help: wrong password, wrong virtual host, no permission."""
    cause = unwrap(error)
    if isinstance(
        cause,
        (
            pika_errors.ProbableAuthenticationError,
            pika_errors.ProbableAccessDeniedError,
            pika_errors.AuthenticationError,
        ),
    ):
        return True
    return isinstance(cause, pika_errors.ConnectionClosedByBroker) and cause.reply_code in (403, 530)


def connection_error(error: BaseException, addresses: Sequence[BrokerAddress]) -> PublishError:
    """Our error for a connection that could not be made to any of these."""
    cause = unwrap(error)
    where = ", ".join(address.safe_url for address in addresses)
    if is_refusal(error):
        return _refusal(cause, addresses[-1])
    return BrokerUnreachable(
        f"no broker answers at {where}: {type(cause).__name__}: {cause}. Is RabbitMQ running there, and is broker_url right?"
    )


def _refusal(cause: BaseException, address: BrokerAddress) -> AccessRefused:
    text = str(cause)
    vhost = isinstance(cause, pika_errors.ProbableAccessDeniedError) or "vhost" in text
    if isinstance(cause, pika_errors.ConnectionClosedByBroker) and cause.reply_code == 403:
        vhost = False
    if vhost:
        return AccessRefused(
            f"the broker at {address.host}:{address.port} refused virtual host {address.vhost!r} to user {address.user!r}: "
            f"{text}. Does it exist (rabbitmqctl list_vhosts), and may the user use it (rabbitmqctl set_permissions)?"
        )
    return AccessRefused(
        f"the broker at {address.host}:{address.port} refused the login of user {address.user!r}: check the user and the "
        "password in broker_url (guest may log in from localhost only)"
    )
