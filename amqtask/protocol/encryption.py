"""The envelope of encrypted bodies: AES-GCM (NIST SP 800-38D) under one of several keys, so that keys can be changed.

    1 byte: the version, 1 | 1 byte: the length of the key's id | the id, ASCII | 12 bytes: the nonce, random | ciphertext, tag

What is before the nonce is authenticated, and so is what the body belongs to: a task's message by the headers `task` and `id`.
Who can write to the broker can therefore neither change a body nor put it under another task's name or id; both stay the same
when a message is delayed, retried, dead-lettered, moved or sent from an outbox. Results and events are bound to nothing.

The keys are the process's, as Celery's key for signatures is: those of the settings that named some last.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from amqtask.exceptions import ConfigurationError, SecurityError, WrongValue
from amqtask.ground.printable import described, printable

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    from amqtask.ground.shapes import Headers

VERSION = 1
# A nonce of 96 bits, as SP 800-38D advises; one key should encrypt no more than 2**32 messages with random ones (section 8.3).
NONCE = 12
TAG = 16
LONGEST_ID = 64
KEY_SIZES = (16, 24, 32)
_HOW = "a key is 32 random bytes in base64: openssl rand -base64 32"


class KeysSaid(NamedTuple):
    """The settings encryption_keys (ids to bytes) and encryption_key_id."""

    keys: Mapping[str, bytes] | None
    current: str | None


def read_keys(keys: object) -> dict[str, bytes]:
    """The keys of a mapping from ids to base64 (or bytes). Raises: WrongValue, which names the id and no key."""
    if not isinstance(keys, Mapping) or not keys:
        raise WrongValue(
            f"setting encryption_keys wants a mapping of key ids to keys, not {described(keys)} without any; {_HOW}"
        )
    return {_key_id(key_id): _key(key_id, key) for key_id, key in keys.items()}


def _key_id(key_id: object) -> str:
    if not isinstance(key_id, str) or not (key_id.isascii() and key_id.isprintable() and 0 < len(key_id) <= LONGEST_ID):
        raise WrongValue(
            f"setting encryption_keys: the id of a key is 1 to {LONGEST_ID} printable ASCII characters, not "
            f"{printable(repr(key_id), 100)}"
        )
    return key_id


def _key(key_id: str, key: object) -> bytes:
    try:
        decoded = (
            base64.b64decode(key, validate=True)
            if isinstance(key, str)
            else bytes(key)
            if isinstance(key, bytes)
            else b""
        )
    except (binascii.Error, ValueError):
        raise WrongValue(f"setting encryption_keys: the key {key_id!r} is not base64; {_HOW}") from None
    if len(decoded) not in KEY_SIZES:
        raise WrongValue(f"setting encryption_keys: the key {key_id!r} has {len(decoded)} bytes, not 32; {_HOW}")
    return decoded


class KeyRing:
    """Encrypts with one key, decrypts with all of them. Threads may share it. Raises: ConfigurationError."""

    def __init__(self, said: KeysSaid) -> None:
        keys, current = said
        if not keys:
            raise ConfigurationError(
                f"the serializer 'encrypted' needs keys: app.conf.encryption_keys = {{'2026-11': '…'}}; {_HOW}"
            )
        if current is not None and current not in keys:
            raise ConfigurationError(
                f"encryption_key_id is {current!r}, and encryption_keys has no such key: {', '.join(keys)}"
            )
        self.current = next(iter(keys)) if current is None else current
        make, self._invalid = _library()
        self._ciphers = {key_id.encode("ascii"): make(key) for key_id, key in keys.items()}
        written_id = self.current.encode("ascii")
        self._cipher = self._ciphers[written_id]
        self._head = bytes((VERSION, len(written_id))) + written_id

    def encrypt(self, text: bytes, subject: Headers | None) -> bytes:
        """The envelope. `subject`: the headers of the task message that it is the body of, if it is one."""
        nonce = os.urandom(NONCE)
        return self._head + nonce + self._cipher.encrypt(nonce, text, self._head + _belongs_to(subject))

    def decrypt(self, body: bytes, subject: Headers | None) -> bytes:
        """What `encrypt` wrote with any of the keys. Raises: SecurityError."""
        head, key_id = _parts(body)
        cipher = self._ciphers.get(key_id)
        if cipher is None:
            raise SecurityError(f"the body is encrypted with the key {_shown(key_id)}, which is not in encryption_keys")
        nonce_end = len(head) + NONCE
        try:
            return cipher.decrypt(body[len(head) : nonce_end], body[nonce_end:], head + _belongs_to(subject))
        except self._invalid as error:
            raise SecurityError(
                f"the body cannot be decrypted with the key {_shown(key_id)}: it was changed, it belongs to a task of another "
                "name or id, or another key has that id"
            ) from error


def _parts(body: bytes) -> tuple[bytes, bytes]:
    """What stands before the nonce, and the key's id in it. Raises: SecurityError."""
    if len(body) < 2 or body[0] != VERSION or len(body) < 2 + body[1] + NONCE + TAG or not body[1]:
        raise SecurityError(f"the body is no encrypted one of version {VERSION} ({len(body)} bytes)")
    head = bytes(body[: 2 + body[1]])
    return head, head[2:]


def key_id_of(body: bytes) -> str:
    """The id of the key that a body was encrypted with, for people. Raises: SecurityError."""
    return _shown(_parts(body)[1])


def _shown(key_id: bytes) -> str:
    return repr(printable(key_id.decode("ascii", "backslashreplace"), LONGEST_ID))


def _belongs_to(subject: Headers | None) -> bytes:
    if subject is None:
        return b""
    return b"\0".join(str(subject.get(name) or "").encode("utf-8", "surrogatepass") for name in ("task", "id"))


def _library() -> tuple[type[AESGCM], type[Exception]]:
    try:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError as error:
        raise ConfigurationError(
            "the serializer 'encrypted' needs the library cryptography: pip install \"amqtask[auth]\""
        ) from error
    return AESGCM, InvalidTag


# -- the process's keys

_said: list[Callable[[], KeysSaid]] = []
_made: list[tuple[KeysSaid, KeyRing]] = []


def use_keys(said: Callable[[], KeysSaid]) -> None:
    """Take the keys from there from now on; they are looked at for each body, so that they can be changed."""
    _said[:] = [said]


def key_ring() -> KeyRing:
    """The process's keys. Raises: ConfigurationError."""
    said = _said[0]() if _said else KeysSaid(None, None)
    if _made:
        known, ring = _made[0]
        if known.keys is said.keys and known.current == said.current:
            return ring
    ring = KeyRing(said)
    _made[:] = [(said, ring)]
    return ring
