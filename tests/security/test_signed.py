"""The serializer `auth`: what is signed by a known certificate is read, and nothing else is even decoded."""

from __future__ import annotations

import base64
import logging
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from hypothesis import given
from hypothesis import strategies as st

from amqtask import AmqTask, chain, chord, group
from amqtask.exceptions import ConfigurationError, ContentDisallowed, EncodeError, MessageError, SecurityError
from amqtask.ground.loop import Aside
from amqtask.protocol import serialization as formats
from amqtask.protocol.message import Message, Properties
from amqtask.protocol.serialization import AUTH, JSON, dumps, loads
from amqtask.security import SEPARATOR, read_key, setup_security
from amqtask.testing.worker import start_worker
from amqtask.transport.loop import PikaLoop
from integration.signers import Signers
from integration.waiting import eventually

ONLY_SIGNED = frozenset({AUTH})
VALUE = [[1, "ü\x00\x01"], {"n": None}, None]


def app_of(signers: Signers, name: str = "one", **settings: Any) -> AmqTask:
    app = AmqTask("signed", set_as_current=False, broker="memory://", backend="cache+memory://")
    app.conf.update({**signers.settings(name), **settings})
    return app


def signed(signers: Signers, name: str = "one", value: object = VALUE, **options: Any) -> bytes:
    """A body that `name` has signed."""
    app_of(signers, name).setup_security(**options)
    return dumps(value, "auth").body


def fields_of(body: bytes) -> list[bytes]:
    return base64.b64decode(body).split(SEPARATOR, 4)


def with_field(body: bytes, index: int, field: bytes) -> bytes:
    fields = fields_of(body)
    fields[index] = field
    return base64.b64encode(SEPARATOR.join(fields))


def refusal(body: bytes) -> str:
    with pytest.raises(SecurityError) as refused:
        loads(body, AUTH, "utf-8", ONLY_SIGNED)
    return str(refused.value)


class Bomb:
    """Unpickled it says so in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


# -- the envelope


def test_what_one_signs_another_reads(signers: Signers) -> None:
    body = signed(signers, "one")
    app_of(signers, "two").setup_security()

    assert loads(body, AUTH, "utf-8", ONLY_SIGNED) == VALUE


def test_the_envelope_is_celerys(signers: Signers) -> None:
    body, content_type, encoding = signed(signers), *dumps(VALUE, "auth")[1:]

    signer, signature, inner_type, inner_encoding, inner = fields_of(body)
    assert (content_type, encoding) == ("application/data", "utf-8")
    assert base64.b64decode(signer).decode().startswith("DE one at Müller's ")
    assert len(base64.b64decode(signature)) == 256
    assert (inner_type, inner_encoding, inner) == (b"application/json", b"utf-8", dumps(VALUE, "json").body)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


def test_whatever_is_signed_comes_back_and_changed_anywhere_it_does_not(signers: Signers) -> None:
    app_of(signers).setup_security()

    @given(VALUES, st.data())
    def each(value: Any, data: st.DataObject) -> None:
        body = dumps(value, "auth").body
        assert loads(body, AUTH, "utf-8", ONLY_SIGNED) == value
        place = data.draw(st.integers(0, len(body) - 1))
        changed = body[:place] + bytes([data.draw(st.integers(0, 255))]) + body[place + 1 :]
        try:
            # The padding of base64 has bits that mean nothing; and the fields before the body are not signed.
            assert loads(changed, AUTH, "utf-8", ONLY_SIGNED) == value
        except MessageError:
            assert changed != body

    each()


def test_garbage_is_refused_by_name(signers: Signers) -> None:
    app_of(signers).setup_security()

    @given(st.binary(max_size=200))
    def each(garbage: bytes) -> None:
        for body in (garbage, base64.b64encode(garbage), base64.b64encode(SEPARATOR.join([garbage] * 5))):
            with pytest.raises(SecurityError):
                loads(body, AUTH, "utf-8", ONLY_SIGNED)

    each()


# -- every kind of bad signature


def test_a_changed_body_is_refused(signers: Signers) -> None:
    body = with_field(signed(signers), 4, b"[[2], {}, null]")

    assert "it was changed, or signed with another key" in refusal(body)


def test_a_signature_of_another_body_or_signer_is_refused(signers: Signers) -> None:
    body, another = signed(signers, value=1), signed(signers, value=2)
    by_two = signed(signers, "two", value=1)

    assert "signed with another key" in refusal(with_field(body, 1, fields_of(another)[1]))
    assert "signed with another key" in refusal(with_field(body, 1, fields_of(by_two)[1]))
    assert "signed with another key" in refusal(with_field(body, 0, fields_of(by_two)[0]))
    assert "signed with another key" in refusal(with_field(body, 1, b""))


def test_an_unknown_signer_is_named(signers: Signers) -> None:
    body = signed(signers, "two")
    signers.certificate("two").rename(signers.folder / "two.pem")
    app_of(signers, "one").setup_security()

    reason = refusal(body)
    assert "two at Müller's" in reason
    assert "not in security_cert_store" in reason


def test_a_certificate_that_is_removed_is_unknown_without_a_restart(
    signers: Signers, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = signed(signers, "two")
    app_of(signers, "one").setup_security()
    assert loads(body, AUTH, "utf-8", ONLY_SIGNED) == VALUE

    monkeypatch.setattr("amqtask.security.LOOK_SECONDS", -1.0)
    signers.certificate("two").unlink()

    assert "not in security_cert_store" in refusal(body)


def test_a_certificate_that_is_added_is_known_without_a_restart(
    signers: Signers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amqtask.security.SEARCH_SECONDS", -1.0)
    body = signed(signers, "two")
    aside = signers.certificate("two").rename(signers.folder / "two.pem")
    app_of(signers, "one").setup_security()
    refusal(body)

    aside.rename(signers.certificate("two"))

    assert loads(body, AUTH, "utf-8", ONLY_SIGNED) == VALUE


def test_a_file_that_is_no_certificate_does_not_harm_a_process_that_runs(
    signers: Signers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    body = signed(signers, "two")
    app_of(signers, "one").setup_security()
    monkeypatch.setattr("amqtask.security.LOOK_SECONDS", -1.0)

    (signers.store / "notes.txt").write_text("not a certificate")

    assert loads(body, AUTH, "utf-8", ONLY_SIGNED) == VALUE
    assert "notes.txt is not a certificate" in caplog.text


def test_an_expired_signer_is_refused_with_the_day(signers: Signers) -> None:
    signers.add("two", days=1)
    body = signed(signers, "two")
    key = signers.key("two").read_bytes()
    _expired_copy(signers, key)
    app_of(signers, "one").setup_security()

    assert "has expired (" in refusal(body)


def _expired_copy(signers: Signers, key: bytes) -> None:
    """The certificate of `two` as it will be in two days."""
    before = x509.load_pem_x509_certificate(signers.certificate("two").read_bytes())
    private: Any = serialization.load_pem_private_key(key, None)
    again = (
        x509.CertificateBuilder()
        .subject_name(before.subject)
        .issuer_name(before.issuer)
        .public_key(before.public_key())
        .serial_number(before.serial_number)
        .not_valid_before(before.not_valid_before_utc)
        .not_valid_after(before.not_valid_before_utc + (before.not_valid_after_utc - before.not_valid_before_utc) / 2)
        .sign(private, hashes.SHA256())
    )
    signers.certificate("two").write_bytes(again.public_bytes(serialization.Encoding.PEM))


def test_a_signature_of_another_digest_says_which(signers: Signers) -> None:
    body = signed(signers, digest="sha512")
    app_of(signers).setup_security()

    assert "signed with the digest sha512, and security_digest is sha256" in refusal(body)


def test_the_setting_of_the_digest_holds(signers: Signers) -> None:
    body = signed(signers, digest="sha384")
    app_of(signers, security_digest="SHA384").setup_security()

    assert loads(body, AUTH, "utf-8", ONLY_SIGNED) == VALUE


def test_nothing_is_unpickled_within_a_good_signature_unless_it_was_asked_for(signers: Signers, tmp_path: Path) -> None:
    fuse = tmp_path / "exploded"
    body = signed(signers, value=Bomb(fuse), serializer="pickle")
    app_of(signers).setup_security()

    with pytest.raises(ContentDisallowed, match="x-python-serialize"):
        loads(body, AUTH, "utf-8", ONLY_SIGNED)
    assert not fuse.exists()
    app_of(signers).setup_security(allowed_serializers=["pickle"])
    loads(body, AUTH, "utf-8", ONLY_SIGNED)
    assert fuse.exists()


def test_the_unsigned_content_type_cannot_make_another_thing_of_a_signed_body(signers: Signers) -> None:
    body = with_field(signed(signers), 2, b"application/x-python-serialize")

    with pytest.raises(ContentDisallowed):
        loads(body, AUTH, "utf-8", ONLY_SIGNED)


def test_a_signature_within_a_signature_is_refused(signers: Signers) -> None:
    inner = signed(signers)
    app = app_of(signers)
    app.setup_security()
    body = with_field(inner, 2, AUTH.encode())

    with pytest.raises(ContentDisallowed):
        loads(body, AUTH, "utf-8", ONLY_SIGNED)
    with pytest.raises(ConfigurationError, match="another serializer"):
        app.setup_security(serializer="auth")


def test_a_value_that_cannot_be_written_is_the_callers_error(signers: Signers) -> None:
    app_of(signers).setup_security()

    with pytest.raises(EncodeError, match="json cannot write"):
        dumps(object(), "auth")


# -- setting it up


def told(signers: Signers, **changes: Any) -> str:
    app = app_of(signers)
    app.conf.update(changes)
    with pytest.raises(ConfigurationError) as refused:
        app.setup_security()
    return str(refused.value)


def test_each_mistake_of_a_key_is_told(signers: Signers) -> None:
    signers.add("locked", password="secret")
    signers.add("elliptic", rsa_key=False)
    signers.certificate("elliptic").unlink()
    locked = {"security_key": str(signers.key("locked")), "security_certificate": str(signers.certificate("locked"))}

    assert "security_key /no/such.key cannot be read: No such file" in told(signers, security_key="/no/such.key")
    assert "is encrypted: set security_key_password" in told(signers, **locked)
    assert "the password does not fit" in told(signers, **locked, security_key_password=b"wrong")
    assert "secret" not in told(signers, **locked, security_key_password="secretly")
    assert "is not the key of security_certificate" in told(signers, security_key=str(signers.key("two")))
    assert "not a private key in PEM" in told(signers, security_key=str(signers.certificate("one")))
    assert "another key than RSA" in told(signers, security_key=str(signers.key("elliptic")))
    assert "signed messages need security_key, security_cert_store" in told(
        signers, security_key=None, security_cert_store=None
    )


def test_an_encrypted_key_is_opened_with_text_or_bytes(signers: Signers) -> None:
    signers.add("locked", password="sécret")

    for password in ("sécret", "sécret".encode()):
        app_of(signers, "locked").setup_security(key_password=password)
    assert read_key(str(signers.key("one")), "not needed").key_size == 2048


def test_each_mistake_of_certificates_is_told(signers: Signers, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    signers.add("old", days=-1)
    old = {"security_key": str(signers.key("old")), "security_certificate": str(signers.certificate("old"))}

    assert "security_certificate has expired" in told(signers, **old)
    assert "/no/such.pem cannot be read" in told(signers, security_certificate="/no/such.pem")
    assert "is not a certificate in PEM" in told(signers, security_certificate=str(signers.key("one")))
    assert "has no certificate" in told(signers, security_cert_store=str(tmp_path / "empty"))
    assert "has no certificate" in told(signers, security_cert_store=str(tmp_path / "*.pem"))
    assert "one.key is not a certificate" in told(signers, security_cert_store=f"{signers.folder}/one*")
    assert "'md5' (it is broken: who signs with it can be imitated) is none of sha224" in told(
        signers, security_digest="md5"
    )


def test_what_is_dangerous_is_told_in_warnings(signers: Signers, caplog: pytest.LogCaptureFixture) -> None:
    signers.add("one", days=3)
    signers.key("one").chmod(0o644)
    signers.add("old", days=-1)
    app = app_of(signers, accept_content=["auth", "json"], task_serializer="json")
    app.setup_security(store=signers.store)

    assert "one.key can be read by everybody on this host" in caplog.text
    assert "security_certificate expires on" in caplog.text
    assert "old at Müller's" in caplog.text
    assert "accept_content takes unsigned messages, too (application/json)" in caplog.text
    assert "this process sends tasks without a signature" in caplog.text


def test_an_own_certificate_that_is_not_in_the_store_is_told(
    signers: Signers, caplog: pytest.LogCaptureFixture
) -> None:
    own = signers.certificate("one").rename(signers.folder / "one.pem")

    app_of(signers, security_certificate=own).setup_security()

    assert "will refuse what it signs itself" in caplog.text


def test_a_good_set_up_says_nothing(signers: Signers, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    app_of(signers).setup_security()

    assert caplog.text == ""


def test_who_does_not_accept_signed_messages_is_told_what_to_set(signers: Signers) -> None:
    assert "accept_content = \\['auth'\\]" in told(signers, accept_content=["json"]).replace("[", "\\[").replace(
        "]", "\\]"
    )


def test_celerys_function_takes_the_current_application(signers: Signers) -> None:
    app = app_of(signers)
    app.set_current()

    setup_security(digest="sha256")

    assert loads(dumps(VALUE, "auth").body, AUTH, "utf-8", ONLY_SIGNED) == VALUE


def test_without_set_up_the_serializer_says_what_is_missing(signers: Signers) -> None:
    app = app_of(signers)
    add = app.task(name="add")(lambda x, y: x + y)

    with pytest.raises(ConfigurationError, match=r"call app\.setup_security\(\)"):
        add.delay(1, 2)
    with pytest.raises(ConfigurationError, match=r"call app\.setup_security\(\)"), start_worker(app):
        pass


def test_without_the_library_the_error_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['cryptography'] = None\n"
        "from amqtask import AmqTask\n"
        "from amqtask.exceptions import ImproperlyConfigured\n"
        "app = AmqTask('x', task_serializer='auth', accept_content=['auth'], encryption_keys={'a': 'A' * 43 + '='})\n"
        "for call in (app.setup_security, lambda: app.send_task('t', serializer='encrypted')):\n"
        "    try: call()\n"
        "    except ImproperlyConfigured as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout.count('pip install "amqtask[auth]"') == 2, done.stdout


# -- a worker


def dead_letters(app: AmqTask) -> list[tuple[Any, bytes]]:
    assert app.memory_broker is not None
    return app.memory_broker.messages(f"{app.conf.task_default_queue}.dead")


def test_all_that_follows_a_task_is_signed(signers: Signers) -> None:
    app = app_of(signers)
    app.setup_security()
    add = app.task(name="add")(lambda x, y: x + y)
    total = app.task(name="total")(sum)
    tries: list[int] = []

    @app.task(name="flaky", bind=True, max_retries=3)
    def flaky(self: Any) -> int:
        tries.append(1)
        if len(tries) < 3:
            raise self.retry(countdown=0)
        return len(tries)

    with start_worker(app, pool="threads", concurrency=2):
        assert chain(add.s(1, 2), add.s(3), add.s(4)).delay().get(60) == 10
        assert group(add.s(n, n) for n in range(4)).delay().get(60) == [0, 2, 4, 6]
        assert chord([add.s(n, n) for n in range(4)])(total.s()).get(60) == 12
        assert flaky.delay().get(60) == 3
        assert add.apply_async((1, 1), countdown=0.3).get(60) == 2
        assert app.control.inspect(timeout=10).ping() is not None
    assert dead_letters(app) == []


def test_what_is_not_signed_ends_with_the_dead_and_the_reason(signers: Signers, tmp_path: Path) -> None:
    app = app_of(signers)
    app.setup_security()
    ran: list[int] = []
    note = app.task(name="note")(ran.append)
    good = dumps([[1], {}, None], "auth").body
    fuse = tmp_path / "exploded"
    unsigned = [
        (b"[[2], {}, null]", JSON, "is not signed"),
        (b"[[2], {}, null]", AUTH, "is not a signed one"),
        (pickle.dumps([[Bomb(fuse)], {}, None]), "application/x-python-serialize", "is not signed"),
        (with_field(good, 4, b"[[2], {}, null]"), AUTH, "it was changed"),
    ]

    with start_worker(app):
        for number, (body, mime_type, _) in enumerate(unsigned):
            headers = {"task": "note", "id": f"bad-{number}", "lang": "py"}
            properties = Properties(content_type=mime_type, content_encoding="utf-8", headers=headers)
            app.publisher.publish(Message(body, properties, "", app.conf.task_default_queue))
        note.delay(1).get(60)

    reasons = {str(found.headers["id"]): str(found.headers["x-amqtask-reason"]) for found, _ in dead_letters(app)}
    assert ran == [1]
    assert not fuse.exists()
    assert len(reasons) == len(unsigned)
    for number, (_, _, reason) in enumerate(unsigned):
        assert reason in reasons[f"bad-{number}"]


def test_a_signed_message_of_protocol_1_runs_and_an_unsigned_one_does_not(signers: Signers) -> None:
    app = app_of(signers)
    app.setup_security()
    ran: list[int] = []
    app.task(name="note")(ran.append)
    last = app.task(name="last")(lambda: None)
    fields = {"task": "note", "args": [1], "kwargs": {}, "retries": 0, "eta": None, "expires": None, "utc": True}

    with start_worker(app):
        for value, number in ((fields, 1), ({**fields, "args": [2]}, 2)):
            encoded = dumps({**value, "id": f"old-{number}"}, "auth" if number == 1 else "json")
            properties = Properties(encoded.content_type, encoded.content_encoding, correlation_id=f"old-{number}")
            app.publisher.publish(Message(encoded.body, properties, "", app.conf.task_default_queue))
        last.delay().get(60)

    ((found, _),) = dead_letters(app)
    assert ran == [1]
    assert found.correlation_id == "old-2"
    assert "the message is not signed" in str(found.headers["x-amqtask-reason"])


def test_a_command_that_is_not_signed_is_not_obeyed(signers: Signers) -> None:
    app = app_of(signers)
    app.setup_security()
    with start_worker(app) as worker:
        node = worker.setup.hostname
        assert app.control.inspect([node], timeout=10).ping() == {node: {"ok": "pong"}}
        with app.conf.overridden({"task_serializer": "json", "accept_content": ["json"]}):
            assert app.control.inspect([node], timeout=1).ping() in (None, {})


def test_a_worker_signs_answers_beside_its_loop(signers: Signers) -> None:
    app = app_of(signers)
    app.setup_security()
    sign, verify = formats._DUMP[AUTH], formats._LOAD[AUTH]
    # What was signed, by which thread.
    signed: list[tuple[str, int]] = []
    loops: list[int] = []

    def noted(value: Any, subject: Any = None) -> bytes:
        signed.append((str(value), threading.get_ident()))
        return sign(value, subject)

    formats.sign_with(noted, verify, is_private=False)
    with start_worker(app) as worker:
        node = worker.setup.hostname
        worker.loop.call_soon_threadsafe(lambda: loops.append(threading.get_ident()))
        assert app.control.inspect([node], timeout=10).ping() == {node: {"ok": "pong"}}

    (answered,) = [thread for text, thread in signed if "pong" in text]
    assert answered not in (loops[0], threading.get_ident())


def test_what_is_made_beside_a_loop_comes_in_order_and_all_of_it_at_the_end() -> None:
    loop, came = PikaLoop(), list[int]()
    aside, first = Aside(loop, is_slow=True), threading.Event()

    def turned() -> bool:
        loop.run_once()
        return len(came) == 2

    aside.make(lambda: first.wait(60) and 1, came.append)
    aside.make(lambda: 2, came.append)
    loop.run_once()
    assert came == []
    first.set()
    eventually(turned)
    first.clear()
    aside.make(lambda: first.is_set() and 3, came.append)
    aside.make(lambda: 4, came.append)
    aside.finish()
    aside.make(lambda: 5, came.append)
    loop.run_once()
    loop.close()

    assert came == [1, 2, False, 4, 5]
