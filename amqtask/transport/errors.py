"""Errors of the broker and of pika → our errors, with what to do."""

from __future__ import annotations

import re
import ssl
from collections.abc import Sequence
from typing import Protocol

from pika import exceptions as pika_errors

from amqtask.exceptions import (
    AccessRefused,
    BrokerUnreachable,
    ConnectionBlocked,
    MessageRefused,
    MessageTooLarge,
    PublishError,
    PublishRefused,
    Unroutable,
)
from amqtask.ground.printable import clause
from amqtask.protocol.message import Message
from amqtask.transport.content import FRAME_MAX
from amqtask.transport.url import EXTERNAL, BrokerAddress

NOT_OFFERED = "no way to log in that both know"
NOT_FOUND, PRECONDITION_FAILED, ACCESS_REFUSED, NOT_ALLOWED = 404, 406, 403, 530
# The patterns are compiled by the first error that needs them: most processes have none.
#
# "PRECONDITION_FAILED - message size 1048577 is larger than configured max size 1048576"
_TOO_LARGE = r"message size (\d+) is larger than"
# "NOT_ALLOWED - access to vhost '/' refused for user 'guest': connection limit (1) is reached"; "… number of channels opened for
# user 'guest' has reached the maximum allowed user limit of (1)"
_LIMIT = r"limit (?:\(\d+\) is reached|of \(\d+\))"
# pika's guesses; their text contains the original error: "ConnectionClosedByBroker: (403) 'ACCESS_REFUSED - …'".
_GUESSES = (
    pika_errors.ProbableAuthenticationError,
    pika_errors.ProbableAccessDeniedError,
    pika_errors.IncompatibleProtocolError,
)
_TOLD = r"(?s)ConnectionClosedByBroker: \((\d+)\) ['\"](.*)['\"]"


class ChannelClosing(Protocol):
    """Why the broker closed a channel: pika's ChannelClosedByBroker, or the same from another library."""

    @property
    def reply_code(self) -> int: ...

    @property
    def reply_text(self) -> str: ...


# -- connecting


def unwrap(error: BaseException) -> BaseException:
    """The innermost cause under the layers of pika's connection workflow."""
    cause = error
    while True:
        inner_errors = getattr(cause, "exceptions", None)
        inner = (
            inner_errors[-1]
            if inner_errors
            else getattr(cause, "exception", None) or (cause.args[0] if cause.args else None)
        )
        if not isinstance(inner, BaseException):
            return cause
        cause = inner


def refusal(error: BaseException) -> tuple[int, str] | None:
    """The broker's code and text when it refused the login or the virtual host, so that trying again cannot help; else None.

    pika guesses a refusal from how far the handshake had come when the connection ended (its Probable… errors). Only the broker's
    own answer counts: RabbitMQ answers a wrong login with connection.close (403) to clients with the capability
    authentication_failure_close, and a virtual host that does not exist or that the user may not use with 530. A reached limit of
    connections is answered with 530, too; it is no refusal, because it passes.
    """
    cause = unwrap(error)
    if isinstance(cause, pika_errors.ConnectionClosedByBroker):
        reply = cause.reply_code, cause.reply_text
    elif isinstance(cause, pika_errors.AuthenticationError):
        reply = ACCESS_REFUSED, f"{NOT_OFFERED}: {cause}"
    else:
        match = re.search(_TOLD, str(cause)) if isinstance(cause, _GUESSES) else None
        if match is None:
            return None
        reply = int(match[1]), match[2]
    return reply if reply[0] in (ACCESS_REFUSED, NOT_ALLOWED) and not re.search(_LIMIT, reply[1]) else None


def connection_error(error: BaseException, addresses: Sequence[BrokerAddress]) -> PublishError:
    """Our error for a connection that could not be made to any of these."""
    reply = refusal(error)
    if reply is not None:
        return access_refused(addresses[-1], reply[1], is_login=reply[0] == ACCESS_REFUSED)
    return unreachable(unwrap(error), addresses)


# The peer answered, spoke TLS, and ended the connection: not a wrong port, host or certificate.
_HUNG_UP = (
    ConnectionResetError,
    BrokenPipeError,
    ssl.SSLEOFError,
    ssl.SSLZeroReturnError,
    pika_errors.AMQPConnectionError,
)


def unreachable(cause: BaseException, addresses: Sequence[BrokerAddress]) -> BrokerUnreachable:
    """The error for an attempt that no broker answered.

    With TLS 1.3 a broker that demands a certificate hangs up after the client's handshake; whether its alert is read before the
    connection ends is a matter of microseconds."""
    urls = ", ".join(address.safe_url for address in addresses)
    reason = (
        f"the connection was lost in the handshake: {cause}"
        if isinstance(cause, _GUESSES)
        else f"{type(cause).__name__}: {cause}"
    )
    hint = _about_tls(cause, addresses[-1])
    return BrokerUnreachable(f"no broker answers at {urls}: {clause(reason)}. {addresses[0].question}{hint}")


# What aiormq makes of bytes that are not AMQP: it takes some of them for the size of a frame.
_NO_FRAME = r"Read \d+ bytes but (\d+) bytes expected"
_TLS_RECORD = "\\x15\\x03"


def _about_tls(cause: BaseException, address: BrokerAddress) -> str:
    """What may be wrong between both ends about TLS."""
    text = str(cause)
    if address.tls is None:
        no_frame = re.search(_NO_FRAME, text)
        is_strange = isinstance(cause, pika_errors.IncompatibleProtocolError) or _TLS_RECORD in text
        if is_strange or (no_frame is not None and int(no_frame[1]) > FRAME_MAX):
            return " Perhaps TLS is spoken there: then the URL begins with amqps:// (RabbitMQ's port for it is 5671)."
    elif "WRONG_VERSION_NUMBER" in text:
        return (
            " No TLS is spoken there: RabbitMQ's port for amqps:// is 5671, and the one for amqp://, without TLS, 5672."
        )
    elif isinstance(cause, _HUNG_UP) and address.tls.certfile is None and "certificate" not in text.lower():
        return " Perhaps it wants a client certificate (certfile and keyfile, see docs/tls.md)."
    return ""


def access_refused(address: BrokerAddress, text: str, *, is_login: bool) -> AccessRefused:
    """The error for a refused login, or else a refused virtual host."""
    broker = f"the broker at {address.host}:{address.port}"
    certificate = address.tls.certfile if address.tls is not None else None
    has_certificate = address.login_method == EXTERNAL
    if not is_login:
        user = f"the user of certificate {certificate}" if has_certificate else f"user {address.user!r}"
        return AccessRefused(
            f"{broker} refused virtual host {address.vhost!r} to {user}: {clause(text)}. "
            "Does it exist (rabbitmqctl list_vhosts), and may the user use it (rabbitmqctl set_permissions)?"
        )
    if not has_certificate:
        return AccessRefused(
            f"{broker} refused the login of user {address.user!r}: check the user and the password in broker_url (guest may log "
            "in from localhost only)"
        )
    if text.startswith(NOT_OFFERED):
        return AccessRefused(
            f"{broker} offers no login by certificate (EXTERNAL): enable the plugin rabbitmq_auth_mechanism_ssl there, and add "
            "EXTERNAL to auth_mechanisms"
        )
    return AccessRefused(
        f"{broker} refused the login by certificate {certificate}: there must be a user with the certificate's name (its "
        "subject, or its common name: see ssl_cert_login_from in rabbitmq.conf)"
    )


# -- publishing


def unroutable(message: Message) -> Unroutable:
    """The error for a returned message."""
    exchange = f"exchange {message.exchange!r}" if message.exchange else "the default exchange"
    return Unroutable(
        f"{exchange} has no queue for routing key {message.routing_key!r}; the broker returned the message, nothing was "
        "stored. Is the queue declared and bound (does a worker consume it)?"
    )


def refused(message: Message, hosts: Sequence[str] = ()) -> PublishRefused:
    """The error for a nack by each of `hosts`. A nack has no field for a reason, so none is shown."""
    by_hosts = f" at {', '.join(hosts)}" if hosts else ""
    queue = f"queue {message.routing_key!r}"
    target = f"exchange {message.exchange!r} with routing key {message.routing_key!r}" if message.exchange else queue
    return PublishRefused(
        f"the broker{by_hosts} refused the message for {target} (basic.nack), and gives no reason. Look at the queue: is it full "
        "(x-max-length with reject-publish), has it a leader and a majority of its nodes (rabbitmq-queues quorum_status)? And at "
        "the broker's log. Another queue of the same exchange may have it"
    )


def blocked(address: BrokerAddress, reason: str) -> ConnectionBlocked:
    """The error for a deadline that passed while the broker took no publishes."""
    return ConnectionBlocked(
        f"the broker at {address.host}:{address.port} blocks publishing: {reason} "
        "(a memory or disk alarm: rabbitmqctl status). The deadline passed while waiting."
    )


def culprits(cause: ChannelClosing, messages: Sequence[Message], candidates: list[int]) -> list[int]:
    """The indices of the messages that the broker closed the channel for, where its text tells: many may go to one missing
    exchange."""
    if len(candidates) < 2:
        return candidates
    too_large = re.search(_TOO_LARGE, cause.reply_text)
    if too_large is not None:
        size = int(too_large[1])
        exact = [index for index in candidates if len(messages[index].body) == size]
        return exact or [max(candidates, key=lambda index: len(messages[index].body))]
    if cause.reply_code in (NOT_FOUND, ACCESS_REFUSED):
        return [index for index in candidates if f"exchange '{messages[index].exchange}'" in cause.reply_text]
    return []


def channel_error(cause: ChannelClosing, message: Message) -> PublishError:
    """The error of a message that the broker closed the channel for."""
    if re.search(_TOO_LARGE, cause.reply_text):
        return MessageTooLarge(
            f"the message of {len(message.body)} bytes is over the broker's limit: {cause.reply_text} "
            "(max_message_size). Store large data elsewhere and pass where it is."
        )
    if cause.reply_code == ACCESS_REFUSED:
        exchange = f"exchange {message.exchange!r}" if message.exchange else "the default exchange"
        return AccessRefused(f"may not publish to {exchange}: {lacks('write', cause.reply_text)}")
    if cause.reply_code == NOT_FOUND:
        return Unroutable(
            f"exchange {message.exchange!r} does not exist: {clause(cause.reply_text)}. "
            "Declare it (task_queues), or publish to a queue."
        )
    return MessageRefused(
        f"the broker does not take the message for routing key {message.routing_key!r}: "
        f"{cause.reply_code} {cause.reply_text}"
    )


def connection_closed_for(message: Message, cause: BaseException) -> MessageRefused:
    """The error of a message with which no connection lasts."""
    return MessageRefused(
        f"the message for routing key {message.routing_key!r} cannot be published: with it on its way the connection to the "
        f"broker ends ({cause})"
    )


# -- rights


# "ACCESS_REFUSED - access to queue 'jobs' in vhost '/' refused for user 'app'"; from RabbitMQ 3.12 on "… - write access to …".
_NO_ACCESS = (
    r"(?:(?P<right>configure|write|read) )?access to (?P<kind>queue|exchange|topic) '(?P<name>[^']*)'.*"
    r" in vhost '(?P<vhost>[^']*)' refused for user '(?P<user>[^']*)'"
)
_PLACES = {"configure": "CONF", "write": "WRITE", "read": "READ"}


def lacks(right: str, text: str) -> str:
    """Which user lacks which right on what, and the command that grants it. `right` is the right that the operation needs, for
    brokers whose text (`text`) does not name it."""
    match = re.search(_NO_ACCESS, text)
    if match is None:
        return f"{text} (rabbitmqctl set_permissions)"
    right = match["right"] or right
    user, vhost, name = match["user"], match["vhost"], match["name"]
    return (
        f"user {user!r} has no {right} permission on {match['kind']} {name!r} in virtual host {vhost!r}. Give it one: "
        f"rabbitmqctl set_permissions -p {vhost} {user} CONF WRITE READ, three regular expressions, with a {_PLACES[right]} "
        f"that matches {name!r} (docs/security.md has them for each role)"
    )


# -- declaring


# "NOT_FOUND - home node 'rabbit@b' of durable queue 'jobs' in vhost '/' is down or inaccessible"
_AWAY = r"is down or inaccessible|process is stopped|due to timeout|timed out"
RESOURCE_ERROR, INTERNAL_ERROR = 506, 541


def is_away(cause: ChannelClosing) -> bool:
    """Whether a queue exists and cannot be reached now: the node that holds it is down."""
    return cause.reply_code in (RESOURCE_ERROR, INTERNAL_ERROR) or re.search(_AWAY, cause.reply_text) is not None


def declare_error(name: str, cause: ChannelClosing) -> PublishError:
    """The error for an entity that the broker refuses to declare."""
    if is_away(cause):
        return PublishRefused(f"{name} cannot be reached: {cause.reply_code} {cause.reply_text}")
    if cause.reply_code == ACCESS_REFUSED:
        return AccessRefused(f"may not declare {name}: {lacks(_asked_by(name, cause), cause.reply_text)}")
    return PublishError(f"declaring {name} failed: {cause.reply_code} {cause.reply_text}")


def _asked_by(name: str, cause: ChannelClosing) -> str:
    """The right that a declaration needs: a binding writes to its destination and reads from its source."""
    if not name.startswith("the binding"):
        return "configure"
    return "write" if "access to queue" in cause.reply_text else "read"
