"""Keys and certificates as docs/signed-messages.md makes them: a folder with `NAME.key` and `certs/NAME.pem` for each signer."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID


class Signers:
    """The folder; `store` is the one with the certificates."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = folder / "certs"
        self.store.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, *, days: float = 30, password: str = "", bits: int = 2048, rsa_key: bool = True) -> None:
        """A key and its certificate, valid until `days` from now."""
        key: Any = rsa.generate_private_key(65537, bits) if rsa_key else ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name(
            [
                x509.NameAttribute(NameOID.COUNTRY_NAME, "DE"),
                x509.NameAttribute(NameOID.COMMON_NAME, f"{name} at Müller's"),
            ]
        )
        now = dt.datetime.now(dt.timezone.utc)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=60))
            .not_valid_after(now + dt.timedelta(days=days))
            .sign(key, hashes.SHA256())
        )
        how = serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
        self.key(name).write_bytes(
            key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)
        )
        self.key(name).chmod(0o600)
        self.certificate(name).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def key(self, name: str) -> Path:
        """Its private key."""
        return self.folder / f"{name}.key"

    def certificate(self, name: str) -> Path:
        """Its certificate, in the store."""
        return self.store / f"{name}.pem"

    def settings(self, name: str) -> dict[str, Any]:
        """Of an application that signs as `name`, as Celery's guide has them."""
        return {
            "security_key": str(self.key(name)),
            "security_certificate": str(self.certificate(name)),
            "security_cert_store": str(self.store),
            "task_serializer": "auth",
            "result_serializer": "auth",
            "event_serializer": "auth",
            "accept_content": ["auth"],
        }
