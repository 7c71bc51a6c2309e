"""Errors: the broker's words become the one named error of the one message they are about."""

from __future__ import annotations

import ssl
from typing import NamedTuple

import pytest
from pika import exceptions as pika_errors
from pika.adapters.utils.connection_workflow import AMQPConnectorAMQPHandshakeError, AMQPConnectorSocketConnectError

from amqtask.exceptions import (
    AccessRefused,
    BrokerUnreachable,
    MessageRefused,
    MessageTooLarge,
    PublishError,
    PublishRefused,
    Unroutable,
)
from amqtask.protocol.message import Message, Properties
from amqtask.transport.errors import (
    channel_error,
    connection_error,
    culprits,
    declare_error,
    is_away,
    refusal,
    refused,
)
from amqtask.transport.url import parse_broker_urls

ADDRESSES = parse_broker_urls("amqp://user:secret@one/shop;amqp://user:secret@two/shop")


class Closing(NamedTuple):
    """What the broker said when it closed a channel."""

    reply_code: int
    reply_text: str


NO_EXCHANGE = Closing(404, "NOT_FOUND - no exchange 'missing' in vhost '/'")
NOT_ALLOWED = Closing(403, "ACCESS_REFUSED - access to exchange 'secret' in vhost '/' refused for user 'guest'")
TOO_LARGE = Closing(406, "PRECONDITION_FAILED - message size 30 is larger than configured max size 20")
INVALID = Closing(406, "PRECONDITION_FAILED - invalid expiration 'soon'")


def message(exchange: str = "", size: int = 1) -> Message:
    """A message to an exchange."""
    return Message(b"x" * size, Properties(), exchange, "key")


@pytest.mark.parametrize(
    ("closing", "kind"),
    [
        (NO_EXCHANGE, Unroutable),
        (NOT_ALLOWED, AccessRefused),
        (TOO_LARGE, MessageTooLarge),
        (INVALID, MessageRefused),
    ],
)
def test_a_closed_channel_has_a_named_error(closing: Closing, kind: type[PublishError]) -> None:
    error = channel_error(closing, message())

    assert type(error) is kind
    if closing is not NOT_ALLOWED:
        assert closing.reply_text in str(error)


@pytest.mark.parametrize("words", ["access to", "write access to"])
def test_a_missing_right_is_named_with_user_resource_and_command(words: str) -> None:
    text = f"ACCESS_REFUSED - {words} exchange 'amq.default' in vhost 'shop' refused for user 'web'"

    error = str(channel_error(Closing(403, text), message()))

    assert "user 'web' has no write permission on exchange 'amq.default' in virtual host 'shop'" in error
    assert "rabbitmqctl set_permissions -p shop web" in error


def test_words_about_rights_that_are_not_known_are_told_as_they_are() -> None:
    assert "something else" in str(channel_error(Closing(403, "ACCESS_REFUSED - something else"), message()))


def test_all_messages_to_a_missing_exchange_are_meant() -> None:
    messages = [message(), message("missing"), message("there"), message("missing")]

    assert culprits(NO_EXCHANGE, messages, [0, 1, 2, 3]) == [1, 3]


def test_the_message_of_the_named_size_is_meant_not_a_larger_one() -> None:
    messages = [message(size=10), message(size=40), message(size=30)]

    assert culprits(TOO_LARGE, messages, [0, 1, 2]) == [2]
    assert culprits(TOO_LARGE, messages, [0, 1]) == [1]


def test_of_one_message_there_is_no_doubt() -> None:
    assert culprits(INVALID, [message(), message()], [1]) == [1]


def test_words_that_name_nobody_leave_it_open() -> None:
    assert culprits(INVALID, [message(), message()], [0, 1]) == []
    assert culprits(INVALID, [], []) == []


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        (
            pika_errors.ProbableAuthenticationError(
                repr(pika_errors.ConnectionClosedByBroker(403, "ACCESS_REFUSED - Login was refused"))
            ),
            "password",
        ),
        (pika_errors.ConnectionClosedByBroker(403, "ACCESS_REFUSED - Login was refused"), "password"),
        (
            pika_errors.ProbableAccessDeniedError(
                repr(pika_errors.ConnectionClosedByBroker(530, "NOT_ALLOWED - vhost shop not found"))
            ),
            "virtual host 'shop'",
        ),
        (pika_errors.ConnectionClosedByBroker(530, "NOT_ALLOWED - vhost shop not found"), "virtual host 'shop'"),
    ],
)
def test_a_refused_login_says_what_to_check(cause: BaseException, expected: str) -> None:
    wrapped = AMQPConnectorAMQPHandshakeError(cause)

    error = connection_error(wrapped, ADDRESSES)

    assert refusal(wrapped) is not None
    assert isinstance(error, AccessRefused)
    assert expected in str(error)
    assert "secret" not in str(error)


@pytest.mark.parametrize(
    "cause",
    [
        pika_errors.ProbableAuthenticationError(repr(pika_errors.StreamLostError("ConnectionResetError"))),
        pika_errors.ProbableAccessDeniedError(repr(pika_errors.StreamLostError("EOF"))),
        pika_errors.ConnectionClosedByBroker(541, "INTERNAL_ERROR - vhost 'shop' is down"),
        pika_errors.ConnectionClosedByBroker(
            530, "NOT_ALLOWED - access to vhost 'shop' refused for user 'user': connection limit (9) is reached"
        ),
        pika_errors.ConnectionClosedByBroker(
            530,
            "NOT_ALLOWED - number of channels opened for user 'user' has reached the maximum allowed user limit of (9)",
        ),
    ],
)
def test_a_connection_that_is_lost_in_the_handshake_is_no_refusal(cause: BaseException) -> None:
    wrapped = AMQPConnectorAMQPHandshakeError(cause)

    error = connection_error(wrapped, ADDRESSES)

    assert refusal(wrapped) is None
    assert type(error) is BrokerUnreachable
    assert "Probable" not in str(error)


def test_a_nack_is_told_without_a_guess_why() -> None:
    error = refused(message(), ["one:5672", "two:5672"])

    assert "one:5672, two:5672" in str(error)
    assert "queue 'key'" in str(error)
    assert "gives no reason" in str(error)


def test_no_answer_is_no_refusal_and_names_the_hosts() -> None:
    wrapped = AMQPConnectorSocketConnectError(ConnectionRefusedError(111, "Connection refused"))

    error = connection_error(wrapped, ADDRESSES)

    assert refusal(wrapped) is None
    assert type(error) is BrokerUnreachable
    assert "@one:" in str(error)
    assert "@two:" in str(error)
    assert "Connection refused" in str(error)
    assert "secret" not in str(error)


@pytest.mark.parametrize(
    ("url", "cause", "hints"),
    [
        ("amqps://one//", pika_errors.StreamLostError("EOF occurred in violation of protocol"), True),
        ("amqps://one//", ConnectionResetError(104, "Connection reset by peer"), True),
        ("amqps://one//", ConnectionRefusedError(111, "Connection refused"), False),
        ("amqps://one//", ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number"), False),
        ("amqps://one//", OSError(113, "No route to host"), False),
        ("amqps://one//?certfile=mine.pem", pika_errors.StreamLostError("EOF occurred"), False),
        ("amqp://one//", pika_errors.StreamLostError("EOF occurred"), False),
    ],
)
def test_a_tls_broker_that_hangs_up_may_want_a_certificate(url: str, cause: Exception, hints: bool) -> None:
    error = connection_error(AMQPConnectorAMQPHandshakeError(cause), parse_broker_urls(url))

    assert ("Perhaps it wants a client certificate (certfile" in str(error)) is hints


@pytest.mark.parametrize(
    "closing",
    [
        Closing(404, "NOT_FOUND - home node 'rabbit@b' of durable queue 'jobs' in vhost '/' is down or inaccessible"),
        Closing(541, "INTERNAL_ERROR"),
    ],
)
def test_a_queue_that_is_away_with_its_node_is_no_queue_that_cannot_be_declared(closing: Closing) -> None:
    assert is_away(closing)
    assert type(declare_error("queue 'jobs'", closing)) is PublishRefused
    assert not is_away(NO_EXCHANGE)
