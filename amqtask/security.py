"""Signed messages: the serializer `auth` of Celery's, byte for byte (celery/security), and `setup_security`, which sets it up.

A signed body is base64 of five fields with the bytes 00 01 between them:

    base64(the signer's id) | base64(signature) | content type | content encoding | the body as its own serializer wrote it

The id is what names the signer's certificate: the values of its issuer and its serial number, with spaces between them. The
signature is RSA-PSS with MGF1 of the same digest and the longest salt, over the body alone: the two fields before the body are
not signed, so only content types that are named here are decoded. The digest is in no field: both ends are told the same.

The store is looked at again while a process runs: a certificate that is put there is known at once, one that is removed is
unknown within LOOK_SECONDS. As in Celery nothing is asked of a certificate but that it is there, and has not expired.
"""

from __future__ import annotations

import base64
import binascii
import glob
import os
import stat
import time
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from amqtask.exceptions import ConfigurationError, SecurityError
from amqtask.ground.current import current_app
from amqtask.ground.printable import bounded_logger, printable
from amqtask.protocol.serialization import AUTH, JSON, content_type, content_types, dumps, is_private, loads, sign_with

try:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import padding, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from cryptography.x509 import Certificate, load_pem_x509_certificates
except ImportError as missing:
    raise ConfigurationError(
        'messages are signed by the library cryptography, which is not installed: pip install "amqtask[auth]"'
    ) from missing

if TYPE_CHECKING:
    from amqtask.ground.shapes import Headers

logger = bounded_logger("amqtask.security")

SEPARATOR = b"\x00\x01"
# Seconds after which a removed certificate is unknown, at the latest; and between two looks for one that is not known.
LOOK_SECONDS, SEARCH_SECONDS = 5.0, 0.1
# An own certificate that ends earlier than that is told at start.
SOON = timedelta(days=14)
# Characters of the fields that name a content type and an encoding.
_LONGEST_NAME = 255
_DIGESTS: dict[str, hashes.HashAlgorithm] = {
    "sha224": hashes.SHA224(),
    "sha256": hashes.SHA256(),
    "sha384": hashes.SHA384(),
    "sha512": hashes.SHA512(),
    "sha3_224": hashes.SHA3_224(),
    "sha3_256": hashes.SHA3_256(),
    "sha3_384": hashes.SHA3_384(),
    "sha3_512": hashes.SHA3_512(),
}
# Of those a signature that is wrong may have been made with, for the reason that is told.
_GUESSED = ("sha256", "sha512", "sha384", "sha224")


_PADDINGS = {
    name: padding.PSS(mgf=padding.MGF1(digest), salt_length=padding.PSS.MAX_LENGTH) for name, digest in _DIGESTS.items()
}


def check_digest(name: str) -> str:
    """The name of a digest as it is known here. Raises: ConfigurationError."""
    digest_name = name.lower() if isinstance(name, str) else ""
    if digest_name not in _DIGESTS:
        weak = " (it is broken: who signs with it can be imitated)" if digest_name in ("md5", "sha1") else ""
        raise ConfigurationError(f"security_digest {name!r}{weak} is none of {', '.join(_DIGESTS)}")
    return digest_name


class Signer:
    """A certificate by which signatures are verified. Raises: ConfigurationError for one that is not of an RSA key."""

    def __init__(self, certificate: Certificate, path: str) -> None:
        public = certificate.public_key()
        if not isinstance(public, rsa.RSAPublicKey):
            raise ConfigurationError(
                f"{path} is the certificate of another key than RSA, which Celery cannot verify with"
            )
        self.public = public
        self.ends = certificate.not_valid_after_utc
        issuer = " ".join(str(part.value) for part in certificate.issuer)
        self.id = f"{issuer} {certificate.serial_number}"

    @property
    def has_expired(self) -> bool:
        """Whether the time is over for which it is valid."""
        return datetime.now(timezone.utc) >= self.ends

    def verifies(self, signature: bytes, body: bytes, digest: str) -> bool:
        """Whether the signature is of that body, with that digest."""
        try:
            self.public.verify(signature, body, _PADDINGS[digest], _DIGESTS[digest])
        except InvalidSignature:
            return False
        return True


def read_certificates(path: str) -> list[Signer]:
    """The certificates of a PEM file. Raises: ConfigurationError."""
    try:
        with open(path, "rb") as file:
            return [Signer(certificate, path) for certificate in load_pem_x509_certificates(file.read())]
    except OSError as error:
        raise ConfigurationError(f"the certificate {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigurationError(f"{path} is not a certificate in PEM: {error}") from error


class Store:
    """The certificates of a folder, or of the files that a glob fits: whose signatures are taken.

    Raises: ConfigurationError when a file is no certificate, or there is none. Later such a file is told in a warning.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._seen = self._files()
        self._signers: dict[str, Signer] = {}
        for name in self._seen:
            self._add(self._signers, name)
        if not self._signers:
            raise ConfigurationError(f"security_cert_store {path} has no certificate: name a folder of them, or a glob")
        for signer in self._signers.values():
            if signer.has_expired:
                logger.warning("the certificate %r has expired: what it signed is refused", signer.id)
        self._looked = time.monotonic()

    def __len__(self) -> int:
        return len(self._signers)

    def find(self, signer_id: str) -> Signer | None:
        """The certificate of that id, if it is in the store now."""
        age = time.monotonic() - self._looked
        if age > LOOK_SECONDS or (age > SEARCH_SECONDS and signer_id not in self._signers):
            self._look()
        return self._signers.get(signer_id)

    def _look(self) -> None:
        """Read the store again if a file in it has changed."""
        self._looked = time.monotonic()
        files = self._files()
        if files == self._seen:
            return
        self._seen = files
        signers: dict[str, Signer] = {}
        for name in files:
            try:
                self._add(signers, name)
            except ConfigurationError as error:
                logger.warning("security_cert_store: %s", error)
        self._signers = signers
        logger.info("security_cert_store has changed: %d certificates", len(signers))

    def _files(self) -> dict[str, tuple[int, int, int]]:
        pattern = os.path.join(glob.escape(self._path), "*") if os.path.isdir(self._path) else self._path
        files = {}
        for name in sorted(glob.glob(pattern)):
            try:
                status = os.stat(name)
            except OSError:
                continue  # it was removed just now
            if stat.S_ISREG(status.st_mode):
                files[name] = (status.st_mtime_ns, status.st_size, status.st_ino)
        return files

    @staticmethod
    def _add(signers: dict[str, Signer], path: str) -> None:
        for signer in read_certificates(path):
            registered = signers.setdefault(signer.id, signer)
            if registered.public != signer.public:
                raise ConfigurationError(
                    f"{path} has the issuer and serial number of another certificate: {signer.id!r}"
                )


def read_key(path: str, password: bytes | str | None) -> rsa.RSAPrivateKey:
    """The private key of a PEM file. Raises: ConfigurationError; warns of one that everybody can read."""
    try:
        with open(path, "rb") as file:
            pem, mode = file.read(), os.fstat(file.fileno()).st_mode
    except OSError as error:
        raise ConfigurationError(f"security_key {path} cannot be read: {error.strerror}") from error
    if mode & stat.S_IROTH:
        logger.warning(
            "security_key %s can be read by everybody on this host, who can then sign: chmod 600 it (it is %o)",
            path,
            mode & 0o777,
        )
    secret = password.encode() if isinstance(password, str) else password
    try:
        key = load_pem_private_key(pem, secret)
    except TypeError:  # cryptography's for a password that is missing, or that is not needed
        if secret is None:
            raise ConfigurationError(f"security_key {path} is encrypted: set security_key_password") from None
        key = load_pem_private_key(pem, None)
    except ValueError as error:
        cause = "the password does not fit, or it" if secret is not None else "it"
        raise ConfigurationError(f"security_key {path}: {cause} is not a private key in PEM ({error})") from error
    if not isinstance(key, rsa.RSAPrivateKey):
        raise ConfigurationError(f"security_key {path} is another key than RSA, which Celery cannot verify")
    return key


class Signing:
    """Signs what `serializer` writes, and verifies; `accept` are the content types that are decoded within a signature."""

    def __init__(
        self,
        key: rsa.RSAPrivateKey,
        signer: Signer,
        store: Store,
        *,
        digest: str,
        serializer: str,
        accept: frozenset[str],
    ) -> None:
        self._key = key
        self._signer = base64.b64encode(signer.id.encode())
        self._store = store
        self._digest = digest
        self._serializer = serializer
        self._accept = accept

    def dump(self, value: object, subject: Headers | None = None) -> bytes:
        """The signed body. Raises: EncodeError."""
        body, mime_type, encoding = dumps(value, self._serializer, subject)
        signature = self._key.sign(body, _PADDINGS[self._digest], _DIGESTS[self._digest])
        fields = (self._signer, base64.b64encode(signature), mime_type.encode(), encoding.encode(), body)
        return base64.b64encode(SEPARATOR.join(fields))

    def load(self, body: bytes, encoding: str, subject: Headers | None = None) -> object:
        """The value of a signed body. Raises: SecurityError, before anything in it is decoded; ContentDisallowed, Undecodable."""
        signer_id, signature, mime_type, inner_encoding, inner = _fields(body)
        self._verify(signer_id, signature, inner)
        return loads(inner, mime_type, inner_encoding, self._accept, subject)

    def _verify(self, signer_id: str, signature: bytes, body: bytes) -> None:
        name = repr(printable(signer_id, _LONGEST_NAME))
        signer = self._store.find(signer_id)
        if signer is None:
            raise SecurityError(f"the message is signed by {name}, whose certificate is not in security_cert_store")
        if signer.has_expired:
            raise SecurityError(
                f"the message is signed by {name}, whose certificate has expired ({signer.ends:%Y-%m-%d})"
            )
        if signer.verifies(signature, body, self._digest):
            return
        for digest in _GUESSED:
            if digest != self._digest and signer.verifies(signature, body, digest):
                raise SecurityError(
                    f"the message is signed with the digest {digest}, and security_digest is {self._digest}"
                )
        raise SecurityError(
            f"the signature is not that of {name} for this body: it was changed, or signed with another key"
        )


def _fields(body: bytes) -> tuple[str, bytes, str, str, bytes]:
    try:
        signer, signature, mime_type, encoding, inner = base64.b64decode(body, validate=True).split(SEPARATOR, 4)
        if max(len(mime_type), len(encoding)) > _LONGEST_NAME:
            raise ValueError("the name of its content type is too long")
        return (
            base64.b64decode(signer, validate=True).decode(),
            base64.b64decode(signature, validate=True),
            mime_type.decode("ascii"),
            encoding.decode("ascii"),
            inner,
        )
    except (binascii.Error, ValueError) as error:
        raise SecurityError(f"the body is not a signed one ({len(body)} bytes)") from error


def setup_security(
    allowed_serializers: Iterable[str] | None = None,
    key: str | os.PathLike[str] | None = None,
    key_password: bytes | str | None = None,
    cert: str | os.PathLike[str] | None = None,
    store: str | os.PathLike[str] | None = None,
    digest: str | None = None,
    serializer: str = "json",
    app: Any = None,
) -> None:
    """Sign and verify in this process; see `AmqTask.setup_security`. Without `app` the current one is meant."""
    conf = (current_app() if app is None else app).conf
    _check_settings(conf)
    if content_type(serializer) == AUTH:
        raise ConfigurationError(
            "setup_security: what is signed is written by another serializer than 'auth': json, msgpack …"
        )
    paths = [
        os.fsdecode(path)
        for path in _paths(conf, security_key=key, security_certificate=cert, security_cert_store=store)
    ]
    private_key = read_key(paths[0], key_password or conf.security_key_password)
    signer = read_certificates(paths[1])[0]
    if private_key.public_key() != signer.public:
        raise ConfigurationError(f"security_key {paths[0]} is not the key of security_certificate {paths[1]}")
    _check_own(signer, certificates := Store(paths[2]))
    signing = Signing(
        private_key, signer, certificates,
        digest=check_digest(digest or conf.security_digest),
        serializer=serializer,
        accept=content_types([JSON, serializer, *(allowed_serializers or ())]) - {AUTH},
    )  # fmt: skip
    sign_with(signing.dump, signing.load, is_private=is_private(serializer))


def _paths(conf: Mapping[str, Any], **arguments: str | os.PathLike[str] | None) -> list[str | os.PathLike[str]]:
    paths = {name: path or conf[name] for name, path in arguments.items()}
    missing = [name for name, path in paths.items() if not path]
    if missing:
        raise ConfigurationError(f"signed messages need {', '.join(missing)} (docs/signed-messages.md)")
    return [*paths.values()]


def _check_settings(conf: Any) -> None:
    """Raises: ConfigurationError where no signature is asked for; warns where messages without one are taken, too."""
    accepted = content_types(conf.accept_content)
    if AUTH not in accepted:
        raise ConfigurationError(
            "app.setup_security() is for messages that are signed and verified: set task_serializer = 'auth' and "
            "accept_content = ['auth']"
        )
    unsigned = sorted(name for name in accepted if name != AUTH and not is_private(name))
    if unsigned:
        logger.warning(
            "accept_content takes unsigned messages, too (%s): only while you change over", ", ".join(unsigned)
        )
    if content_type(conf.task_serializer) != AUTH:
        logger.warning("task_serializer is %r: this process sends tasks without a signature", conf.task_serializer)


def _check_own(signer: Signer, store: Store) -> None:
    """Raises: ConfigurationError for an own certificate that nobody takes; warns of one that will soon be so."""
    if signer.has_expired:
        raise ConfigurationError(
            f"security_certificate has expired ({signer.ends:%Y-%m-%d}): nobody would take what it signs"
        )
    if signer.ends - datetime.now(timezone.utc) < SOON:
        logger.warning("security_certificate expires on %s", f"{signer.ends:%Y-%m-%d %H:%M} UTC")
    if store.find(signer.id) is None:
        logger.warning(
            "security_certificate is not in security_cert_store: this process will refuse what it signs itself"
        )
