"""Broker URLs: hosts, credentials, TLS, options; never shown with the password."""

from __future__ import annotations

import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pika

from amqtask.exceptions import ConfigurationError

SCHEMES = {"amqp": False, "amqps": True, "pyamqp": False, "rabbitmq": False}
DEFAULT_URL = "amqp://guest:guest@127.0.0.1:5672//"
# Options of broker_use_ssl (Celery's names) and of the URL's query, and ours for both.
_TLS_NAMES = {
    "ca_certs": "cafile",
    "cafile": "cafile",
    "cacertfile": "cafile",
    "certfile": "certfile",
    "keyfile": "keyfile",
    "cert_reqs": "verify",
    "verify": "verify",
    "server_hostname": "server_hostname",
    "server_name_indication": "server_hostname",
}


@dataclass(frozen=True, slots=True)
class TlsOptions:
    """How to speak TLS. `verify` False accepts any certificate: encrypted, but to whomever."""

    cafile: str | None = None
    certfile: str | None = None
    keyfile: str | None = None
    verify: bool = True
    server_hostname: str | None = None

    def context(self) -> ssl.SSLContext:
        """A client context. Raises: ConfigurationError for a certificate that cannot be read."""
        try:
            context = ssl.create_default_context(cafile=self.cafile)
            if self.certfile:
                context.load_cert_chain(self.certfile, self.keyfile)
        except OSError as error:
            named = ", ".join(name for name in (self.cafile, self.certfile, self.keyfile) if name)
            raise ConfigurationError(f"the TLS certificate or key cannot be read ({named}): {error}") from error
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """One broker host and how to log in; timeouts are seconds."""

    host: str = "127.0.0.1"
    port: int = 5672
    user: str = "guest"
    password: str = field(default="guest", repr=False)
    vhost: str = "/"
    tls: TlsOptions | None = None
    heartbeat: int | None = None

    @property
    def safe_url(self) -> str:
        """The URL with the password hidden."""
        return f"{self._scheme}://{self.user}:**@{self._netloc}/{self.vhost}"

    @property
    def url(self) -> str:
        """The URL with the password, for another program; the TLS options are not in it."""
        user, password, vhost = (quote(part, safe="") for part in (self.user, self.password, self.vhost))
        return f"{self._scheme}://{user}:{password}@{self._netloc}/{vhost}"

    @property
    def _scheme(self) -> str:
        return "amqps" if self.tls else "amqp"

    @property
    def _netloc(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def parameters(
        self,
        *,
        heartbeat: int | None = None,
        connect_timeout: float = 4.0,
        blocked_timeout: float | None = None,
        name: str = "",
    ) -> pika.ConnectionParameters:
        """pika's parameters."""
        return pika.ConnectionParameters(
            host=self.host,
            port=self.port,
            virtual_host=self.vhost,
            credentials=self.credentials,
            heartbeat=self.beat(heartbeat),
            socket_timeout=connect_timeout,
            stack_timeout=connect_timeout,
            blocked_connection_timeout=blocked_timeout,
            ssl_options=self.ssl_options(),
            client_properties=client_properties(name),
            tcp_options=TCP_OPTIONS,
            connection_attempts=1,
        )

    @property
    def credentials(self) -> Any:
        """pika's credentials."""
        return pika.PlainCredentials(self.user, self.password)

    def beat(self, heartbeat: int | None) -> int | None:
        """The heartbeat to ask for: the URL's own wins, but over a 0 (nobody will be there to keep it up)."""
        return self.heartbeat if self.heartbeat is not None and heartbeat != 0 else heartbeat

    def ssl_options(self) -> pika.SSLOptions | None:
        """pika's options for TLS. Raises: ConfigurationError for a certificate that cannot be read."""
        if self.tls is None:
            return None
        return pika.SSLOptions(self.tls.context(), self.tls.server_hostname or self.host)


def client_properties(name: str) -> dict[str, Any]:
    """What a connection tells the broker of itself."""
    return {"product": "amqtask", **({"connection_name": name} if name else {})}


# A peer that is silently gone is noticed after a minute of unanswered probes (seconds; USER_TIMEOUT milliseconds).
TCP_OPTIONS = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 30_000}


def parse_broker_urls(
    urls: str | Sequence[str] | None, *, use_ssl: bool | Mapping[str, Any] | None = None
) -> tuple[BrokerAddress, ...]:
    """The addresses of one URL, several separated by `;` or `,`, or a list of them, in order.

    `use_ssl` is Celery's broker_use_ssl: True, or a mapping (keyfile, certfile, ca_certs, cert_reqs).
    Raises: ConfigurationError.
    """
    given = [urls or DEFAULT_URL] if isinstance(urls, str) or urls is None else list(urls)
    parts = [part.strip() for url in given for part in _split(url) if part.strip()]
    if not parts:
        raise ConfigurationError("broker_url is empty; it should look like amqp://user:password@host:5672/vhost")
    return tuple(_parse(part, use_ssl) for part in parts)


def _split(url: str) -> list[str]:
    if ";" in url:
        return url.split(";")
    pieces = url.split(",")
    return pieces if all("://" in piece for piece in pieces) else [url]


def _parse(url: str, use_ssl: bool | Mapping[str, Any] | None) -> BrokerAddress:
    text = url if "://" in url else f"amqp://{url}"
    split = urlsplit(text)
    if split.scheme not in SCHEMES:
        raise ConfigurationError(
            f"broker URL scheme {split.scheme!r} is not AMQP; amqtask speaks to RabbitMQ: amqp://user:password@host/vhost"
        )
    try:
        port = split.port
    except ValueError as error:
        raise ConfigurationError(f"the broker URL's port is no number: {error}") from error
    query = {name: values[-1] for name, values in parse_qs(split.query).items()}
    secure = SCHEMES[split.scheme] or bool(use_ssl)
    tls = _tls({**(use_ssl if isinstance(use_ssl, Mapping) else {}), **query}) if secure else None
    return BrokerAddress(
        host=split.hostname or "127.0.0.1",
        port=port or (5671 if secure else 5672),
        user=unquote(split.username) if split.username else "guest",
        password=unquote(split.password) if split.password is not None else "guest",
        vhost=_vhost(split.path),
        tls=tls,
        heartbeat=_heartbeat(query.get("heartbeat")),
    )


def _heartbeat(text: str | None) -> int | None:
    try:
        return None if text is None else int(float(text))
    except ValueError as error:
        raise ConfigurationError(f"heartbeat={text} in the broker URL is no number of seconds") from error


def _vhost(path: str) -> str:
    """`amqp://h`, `amqp://h/` and `amqp://h//` all mean the vhost `/`."""
    name = unquote(path[1:]) if path.startswith("/") else unquote(path)
    return name or "/"


def _tls(options: Mapping[str, Any]) -> TlsOptions:
    found: dict[str, Any] = {}
    for name, value in options.items():
        target = _TLS_NAMES.get(name)
        if value is None:
            continue
        if target == "verify":
            found[target] = str(value).lower() not in ("0", "false", "no", "none", "verify_none", "cert_none")
            if isinstance(value, int) and not isinstance(value, bool):
                found[target] = value != ssl.CERT_NONE
        elif target is not None:
            found[target] = value
    return TlsOptions(**found)
