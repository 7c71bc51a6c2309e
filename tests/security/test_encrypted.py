"""The serializer `encrypted`: who holds a key reads, nobody else does, and nothing of a value is told beside it."""

from __future__ import annotations

import base64
import logging
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amqtask import AmqTask, Reject, chain, chord, group, signals
from amqtask.backends.contract import BackendOptions
from amqtask.backends.sql import SqlBackend
from amqtask.exceptions import ConfigurationError, ContentDisallowed, SecurityError
from amqtask.outbox.contract import as_message, as_row
from amqtask.protocol.encryption import key_id_of
from amqtask.protocol.message import Delivery, Message
from amqtask.protocol.result import ResultMessage
from amqtask.protocol.serialization import ENCRYPTED, JSON, dumps, loads
from amqtask.services.rerunning import back_to_work
from amqtask.testing.worker import start_worker
from integration.signers import Signers

OLD, NEW = (base64.b64encode(bytes([number]) * 32).decode() for number in (1, 2))
ONLY_ENCRYPTED = frozenset({ENCRYPTED})
SECRET = "4111-1111-1111-1111"
HEADERS = {"task": "charge", "id": "5"}


def app_of(keys: Mapping[str, str] | None = None, **settings: Any) -> AmqTask:
    app = AmqTask("encrypted", set_as_current=False, broker="memory://", backend="cache+memory://")
    own = {
        "encryption_keys": keys or {"2026-11": OLD},
        "task_serializer": "encrypted",
        "result_serializer": "encrypted",
        "accept_content": ["encrypted"],
    }
    app.conf.update({**own, **settings})
    return app


def read(body: bytes, headers: Mapping[str, Any] | None = None) -> Any:
    return loads(body, ENCRYPTED, "binary", ONLY_ENCRYPTED, headers)


def refusal(body: bytes, headers: Mapping[str, Any] | None = None) -> str:
    with pytest.raises(SecurityError) as refused:
        read(body, headers)
    return str(refused.value)


# -- the envelope

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)
SUBJECTS = st.none() | st.fixed_dictionaries({"task": st.text(), "id": st.text()})


def test_whatever_is_encrypted_comes_back_and_changed_anywhere_it_does_not() -> None:
    app_of({"a": OLD, "b": NEW})

    @given(VALUES, SUBJECTS, st.data())
    def each(value: Any, subject: dict[str, str] | None, data: st.DataObject) -> None:
        body = dumps(value, "encrypted", subject).body
        assert read(body, subject) == value
        place, change = data.draw(st.integers(0, len(body) - 1)), data.draw(st.integers(1, 255))
        refusal(body[:place] + bytes([body[place] ^ change]) + body[place + 1 :], subject)
        refusal(body[: data.draw(st.integers(0, len(body) - 1))], subject)

    each()


@given(st.binary(max_size=100))
def test_garbage_is_refused_by_name(garbage: bytes) -> None:
    app_of()

    refusal(garbage)
    refusal(bytes([1, 7]) + b"2026-11" + garbage)


def test_a_body_belongs_to_its_tasks_name_and_id() -> None:
    app_of()
    body = dumps([["4111"], {}, None], "encrypted", HEADERS).body

    assert read(body, {**HEADERS, "retries": 3, "x-delivery-count": 1}) == [["4111"], {}, None]
    for other in ({**HEADERS, "task": "refund"}, {**HEADERS, "id": "6"}, {"task": "charge5", "id": ""}, None):
        assert "it belongs to a task of another name or id" in refusal(body, other)


def test_nothing_of_a_value_is_in_a_body_and_no_two_bodies_are_alike() -> None:
    app_of()
    first, second = (dumps([SECRET], "encrypted").body for _ in range(2))

    assert SECRET.encode() not in first
    assert base64.b64encode(SECRET.encode())[:12] not in first
    assert first != second
    assert len(first) == len(second)


# -- keys


def test_keys_are_changed_in_three_steps_and_each_step_reads_the_one_before() -> None:
    app = app_of({"old": OLD})
    with_old = dumps(1, "encrypted").body

    app.conf.encryption_keys = {"old": OLD, "new": NEW}
    assert key_id_of(dumps(2, "encrypted").body) == "'old'"
    app.conf.encryption_key_id = "new"
    with_new = dumps(2, "encrypted").body
    assert key_id_of(with_new) == "'new'"
    assert (read(with_old), read(with_new)) == (1, 2)
    app.conf.encryption_keys = {"new": NEW}

    assert read(with_new) == 2
    assert "encrypted with the key 'old', which is not in encryption_keys" in refusal(with_old)


def test_another_key_under_the_same_id_reads_nothing() -> None:
    app = app_of({"k": OLD})
    body = dumps(1, "encrypted").body
    app.conf.encryption_keys = {"k": NEW}

    assert "another key has that id" in refusal(body)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({}, "a mapping of key ids to keys"),
        ("secret", "a mapping of key ids to keys, not a str"),
        ({"k": "secret!"}, "the key 'k' is not base64"),
        ({"k": "c2VjcmV0"}, "the key 'k' has 6 bytes, not 32"),
        ({"k": 5}, "the key 'k' has 0 bytes"),
        ({"": OLD}, "the id of a key is 1 to 64 printable ASCII characters, not ''"),
        ({"ü": OLD}, "printable ASCII"),
        ({"k" * 65: OLD}, "1 to 64"),
        ({5: OLD}, "not 5"),
    ],
)
def test_a_mistake_in_the_keys_is_told_without_them(keys: Any, reason: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        AmqTask("x", set_as_current=False, encryption_keys=keys)

    assert reason in str(refused.value)
    assert "secret" not in str(refused.value).replace("'secret!'", "secret!")
    assert "c2Vj" not in str(refused.value)


def test_keys_are_masked_wherever_settings_are_shown() -> None:
    app = app_of()

    assert OLD not in f"{app.conf!r} {app.conf.humanize()} {app.conf.table()}"


def test_without_keys_or_the_key_that_is_named_the_error_says_so() -> None:
    app = app_of()
    app.conf.encryption_key_id = "2027"
    with pytest.raises(
        ConfigurationError, match="encryption_key_id is '2027', and encryption_keys has no such key: 2026-11"
    ):
        app.send_task("t")
    app.conf.update(encryption_key_id=None, encryption_keys=None)
    with pytest.raises(ConfigurationError, match=r"needs keys: app\.conf\.encryption_keys"):
        app.send_task("t")
    with pytest.raises(ConfigurationError, match="needs keys"), start_worker(app):
        pass


# -- messages


def message_of(app: AmqTask, *args: object, **options: Any) -> Message:
    message: Message = app.calls.compose("charge", args, {}, options)
    return message


def test_headers_say_nothing_of_the_arguments_unless_the_caller_says_it() -> None:
    app = app_of(task_compression="gzip")

    message, told = message_of(app, SECRET), message_of(app, SECRET, argsrepr="('****',)")

    assert SECRET not in repr(message)
    assert message.properties.content_type == ENCRYPTED
    assert (message.properties.headers["argsrepr"], message.properties.headers["kwargsrepr"]) == (None, None)
    assert told.properties.headers["argsrepr"] == "('****',)"
    assert "compression" not in message.properties.headers


def test_an_argument_that_cannot_be_written_is_not_shown() -> None:
    with pytest.raises(Exception, match="argument 1 is a set") as refused:
        message_of(app_of(), {SECRET})

    assert SECRET not in str(refused.value)


def test_an_outboxs_row_has_nothing_of_it_and_leads_to_the_same_message() -> None:
    app = app_of()
    message = message_of(app, SECRET, countdown=60)
    row = as_row(message, app.delays)

    again = as_message(row.message, row.body, app.delays)

    assert SECRET not in repr(row)
    assert read(again.body, again.properties.headers)[0] == [SECRET]


def test_a_receiver_of_before_task_publish_sees_and_changes_arguments() -> None:
    app = app_of()
    echo = app.task(name="echo")(lambda value: value)

    def change(body: Any, headers: dict[str, Any], **_: object) -> None:
        assert body[0] == [SECRET]
        body[0][0] = "changed"

    signals.before_task_publish.connect(change, weak=False)
    try:
        with start_worker(app):
            assert echo.delay(SECRET).get(60) == "changed"
    finally:
        signals.before_task_publish.disconnect(change)


def test_all_that_follows_a_task_is_encrypted_and_told_to_nobody(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    app = app_of(worker_send_task_events=True, result_extended=True, event_serializer="json")
    echo = app.task(name="echo")(lambda value: value)
    first = app.task(name="first")(lambda values: values[0])
    failed: list[Any] = []
    app.task(name="failed")(lambda request, error, trace: failed.append(repr(error)))

    @app.task(name="retried", bind=True, max_retries=2)
    def retried(self: Any, value: str) -> str:
        if not self.request.retries:
            raise self.retry(countdown=0, exc=ValueError(value))
        return value

    @app.task(name="broken", acks_on_failure=False)
    def broken(value: str) -> None:
        raise ValueError(value)

    @app.task(name="rejected")
    def rejected(value: str) -> None:
        raise Reject(value)

    with start_worker(app, pool="threads", concurrency=2):
        assert chain(echo.s(SECRET), echo.s(), echo.s()).delay().get(60) == SECRET
        assert group(echo.s(SECRET) for _ in range(3)).delay().get(60) == [SECRET] * 3
        assert chord([echo.s(SECRET) for _ in range(3)])(first.s()).get(60) == SECRET
        assert retried.delay(SECRET).get(60) == SECRET
        assert echo.apply_async((SECRET,), countdown=0.2).get(60) == SECRET
        result = broken.apply_async((SECRET,), link_error=app.signature("failed"))
        with pytest.raises(ValueError, match=SECRET):
            result.get(60)
        rejected.delay(SECRET).get(60, propagate=False)

    dead = app.memory_broker.messages(f"{app.conf.task_default_queue}.dead")  # type: ignore[union-attr]
    assert SECRET not in caplog.text
    assert "broken" in caplog.text
    assert "ValueError (hidden: the message is encrypted)" in caplog.text
    assert {str(found.headers["task"]) for found, _ in dead} == {"broken", "rejected"}
    assert SECRET not in repr([(found.headers, body) for found, body in dead])
    assert SECRET in repr(failed)


def test_what_a_redriven_dead_letter_says_is_read_again() -> None:
    app = app_of()
    tries: list[str] = []

    @app.task(name="charge", acks_on_failure=False)
    def charge(card: str) -> str:
        tries.append(card)
        if len(tries) == 1:
            raise ValueError(card)
        return card

    queue = app.conf.task_default_queue
    with start_worker(app):
        charge.delay(SECRET).get(60, propagate=False)
    with start_worker(app):  # the first worker has ended, so the dead letter is there
        ((found, body),) = app.memory_broker.messages(f"{queue}.dead")  # type: ignore[union-attr]
        delivery = Delivery(body, found, "", f"{queue}.dead", False, f"{queue}.dead", 1, 1)
        app.publisher.publish(back_to_work(delivery, queue))
        app.AsyncResult(str(found.headers["id"])).forget()
        charge.delay("other").get(60)

    assert tries[:2] == [SECRET, SECRET]


def test_one_task_can_be_encrypted_among_others(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    app = app_of(
        task_serializer="json", result_serializer="json", accept_content=["json", "encrypted"], result_extended=True
    )
    open_task = app.task(name="open")(lambda value: len(value))
    hidden = app.task(name="hidden", serializer="encrypted")(lambda value: len(value))

    with start_worker(app):
        assert open_task.delay("public").get(60) == 6
        result = hidden.delay(SECRET)
        assert result.get(60) == len(SECRET)
        assert (result.args, result.kwargs) == (None, None)

    assert "the messages of hidden are encrypted, but what they return or raise is stored as it is" in caplog.text
    assert SECRET not in caplog.text


def test_a_worker_that_refuses_its_own_tasks_serializer_says_so(caplog: pytest.LogCaptureFixture) -> None:
    app = app_of(task_serializer="json", accept_content=["json"])
    app.task(name="hidden", serializer="encrypted")(len)

    with start_worker(app):
        pass

    assert "this worker has tasks whose serializer its accept_content refuses: encrypted" in caplog.text


def test_a_plain_message_is_refused_where_all_are_encrypted() -> None:
    with pytest.raises(ContentDisallowed, match="the message is not encrypted"):
        loads(b"[]", JSON, "utf-8", ONLY_ENCRYPTED)


def test_an_encrypted_message_can_be_signed_too(signers: Signers, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    app = app_of(**signers.settings("one"))
    app.setup_security(serializer="encrypted")
    echo = app.task(name="echo")(lambda value: value)

    assert SECRET not in repr(app.calls.compose("echo", (SECRET,), {}, {}))
    with start_worker(app):
        assert echo.delay(SECRET).get(60) == SECRET
    assert SECRET not in caplog.text


# -- stores


def test_a_database_has_nothing_of_a_result(tmp_path: Path) -> None:
    app_of()
    path = tmp_path / "results.db"
    store = SqlBackend(BackendOptions(url=f"db+sqlite:///{path}", serializer="encrypted", extended=True))
    extra = {"name": "charge", "args": [SECRET], "kwargs": {"card": SECRET}, "worker": "w", "retries": 0, "queue": "q"}
    failed = ResultMessage(
        "1",
        "FAILURE",
        {"exc_type": "ValueError", "exc_message": [SECRET], "exc_module": "builtins"},
        f"…: {SECRET}",
        extra=extra,
    )

    store.store(failed)
    (found,) = store.read(["1"])
    store.close()

    assert found.result == failed.result
    assert found.traceback == failed.traceback
    assert found.extra["args"] == [SECRET]
    assert SECRET not in "\n".join(map(str, sqlite3.connect(path).iterdump()))
    assert SECRET.encode() not in path.read_bytes()
