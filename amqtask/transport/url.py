"""Broker URLs: hosts, credentials, TLS, options; never shown with the password."""

from __future__ import annotations

import re
import ssl
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pika

from amqtask.exceptions import AccessRefused, BrokerUnreachable, ConfigurationError
from amqtask.ground.plugins import near_names
from amqtask.ground.printable import described, printable
from amqtask.protocol import option_types
from amqtask.transport.stream import TCP_OPTIONS, ByteStream, Stream
from amqtask.transport.wire import SocketWire, Wire

if TYPE_CHECKING:
    from amqtask.ground.loop import TurnLoop
    from amqtask.ground.shapes import Options

SCHEMES = {"amqp": False, "amqps": True, "pyamqp": False, "rabbitmq": False}
DEFAULT_URL = "amqp://guest:guest@127.0.0.1:5672//"
# How to log in: by user and password, or by the client's certificate. AMQPLAIN is PLAIN in another form.
PLAIN, EXTERNAL = "PLAIN", "EXTERNAL"
_LOGIN_METHODS = {"plain": PLAIN, "amqplain": PLAIN, "external": EXTERNAL}
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
    "sni": "server_hostname",
}
# Options that py-amqp takes as well; here the defaults of Python's ssl module are used.
_TLS_ELSEWHERE = frozenset(
    {"ssl_version", "ciphers", "check_hostname", "do_handshake_on_connect", "suppress_ragged_eofs", "server_side"}
)
# In URLs for other clients (https://www.rabbitmq.com/docs/uri-query-parameters, pika's URLParameters): without effect here.
_QUERY_ELSEWHERE = frozenset(
    {
        "connection_timeout", "channel_max", "frame_max", "max_message_size", "backpressure_detection",
        "blocked_connection_timeout", "client_properties", "connection_attempts", "locale", "retry_delay", "socket_timeout",
        "stack_timeout", "ssl_options", "tcp_options", "depth", "name_indication", "password", "name",
    }
)  # fmt: skip
_QUERY = frozenset({*_TLS_NAMES, "heartbeat", "auth_mechanism", *_QUERY_ELSEWHERE})
_ESCAPES = "@ as %40, / as %2F, # as %23, ? as %3F, [ as %5B, ] as %5D, ; as %3B, : as %3A, % as %25"


class TlsOptions(NamedTuple):
    """The TLS options. `verify` False accepts any certificate: the connection is encrypted, but may end at any host."""

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
    # EXTERNAL: the broker takes the user from the client's certificate; `user` and `password` say nothing then.
    login_method: str = PLAIN

    @property
    def safe_url(self) -> str:
        """The URL with the password hidden."""
        login = f"{self.user}:**@" if self.login_method == PLAIN else ""
        return f"{self._scheme}://{login}{self._netloc}/{self.vhost}"

    @property
    def question(self) -> str:
        """What to look at when nothing answers there."""
        return "Is RabbitMQ running there, and is broker_url right?"

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
            ssl_options=self._ssl_options(),
            client_properties=client_properties(name),
            tcp_options=TCP_OPTIONS,
            connection_attempts=1,
        )

    def stream(self) -> ByteStream:
        """A stream of bytes to the host, not connected. Raises: ConfigurationError for a certificate that cannot be read."""
        return Stream(self.host, self.port, self._ssl_options())

    def wire(
        self,
        loop: TurnLoop,
        parameters: pika.ConnectionParameters,
        on_open: Callable[[Wire], None],
        on_failed: Callable[[Wire, Exception], None],
        on_closed: Callable[[Wire, Exception], None],
    ) -> Wire:
        """A connection on a loop, that begins to connect; `parameters` are those of this address."""
        return SocketWire(loop, parameters, on_open, on_failed, on_closed)

    @property
    def credentials(self) -> Any:
        """pika's credentials."""
        if self.login_method == EXTERNAL:
            return pika.credentials.ExternalCredentials()
        return pika.PlainCredentials(self.user, self.password)

    def beat(self, heartbeat: int | None) -> int | None:
        """The heartbeat to ask for, in seconds: the URL's, or else `heartbeat`; always 0 when `heartbeat` is 0 (nothing would
        send heartbeats)."""
        return self.heartbeat if self.heartbeat is not None and heartbeat != 0 else heartbeat

    def _ssl_options(self) -> pika.SSLOptions | None:
        """pika's options for TLS. Raises: ConfigurationError for a certificate that cannot be read."""
        if self.tls is None:
            return None
        return pika.SSLOptions(self.tls.context(), self.tls.server_hostname or self.host)


def client_properties(name: str) -> dict[str, Any]:
    """The client properties that a connection sends to the broker."""
    return {"product": "amqtask", **({"connection_name": name} if name else {})}


def parse_broker_urls(
    urls: str | Sequence[str] | None,
    *,
    use_ssl: bool | Mapping[str, object] | None = None,
    login_method: str | None = None,
) -> tuple[BrokerAddress, ...]:
    """The addresses of one URL, several separated by `;` or `,`, or a list of them, in order.

    `use_ssl` is Celery's broker_use_ssl: True, or a mapping (keyfile, certfile, ca_certs, cert_reqs); `login_method` its
    broker_login_method, which a URL's own `auth_mechanism` overrides. Raises: ConfigurationError.
    """
    url_list = [urls or DEFAULT_URL] if isinstance(urls, str) or urls is None else list(urls)
    for url in url_list:
        if not isinstance(url, str):
            raise ConfigurationError(f"a broker URL is text, not {described(url)}")
    parts = [part.strip() for url in url_list for part in _split(url) if part.strip()]
    if not parts:
        raise ConfigurationError("broker_url is empty; it should look like amqp://user:password@host:5672/vhost")
    return tuple(_parse(part, use_ssl, login_method) for part in parts)


Addresses = tuple[BrokerAddress, ...]


def beginning_with(addresses: Addresses, first: BrokerAddress) -> Addresses:
    """The same hosts in the same order, rotated so that this one is first."""
    index = addresses.index(first)
    return addresses[index:] + addresses[:index]


def beginning_after(addresses: Addresses, last: BrokerAddress) -> Addresses:
    """The same hosts in the same order, rotated so that this one is last."""
    index = addresses.index(last) + 1
    return addresses[index:] + addresses[:index]


class HostTurns:
    """Whom to connect to until the deadline (of `clock`): iterate for one round of the hosts, each with the seconds that it has.

    No host may use up the time of those after it.
    """

    def __init__(
        self, addresses: Addresses, deadline: float, connect_timeout: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._addresses = addresses
        self._deadline = deadline
        self._connect_timeout = connect_timeout
        self._clock = clock
        self._last: BrokerUnreachable | None = None
        self._pause = 0.05
        self._is_cut_short = False
        self._until = deadline

    def __iter__(self) -> Iterator[tuple[BrokerAddress, float]]:
        for index, address in enumerate(self._addresses):
            now = self._clock()
            seconds = (self._deadline - now) / (len(self._addresses) - index)
            self._is_cut_short = seconds < self._connect_timeout
            seconds = max(0.05, min(self._connect_timeout, seconds))
            self._until = now + seconds
            yield address, seconds

    def connect(self, attempt: Callable[[BrokerAddress, float], object]) -> None:
        """`attempt(host, until)` with one after the other, round after round, until one succeeds.

        Raises: AccessRefused at once, BrokerUnreachable.
        """
        while True:
            for address, seconds in self:
                try:
                    attempt(address, self._clock() + seconds)
                except AccessRefused:
                    raise
                except BrokerUnreachable as error:
                    self.failed(error)
                else:
                    return
            time.sleep(self.pause())

    def failed(self, error: BrokerUnreachable) -> None:
        """The present attempt has failed. One that the deadline cut short says less than the one before it."""
        if self._last is None or not self._is_cut_short or self._clock() < self._until:
            self._last = error

    def pause(self) -> float:
        """Seconds before the next round. Raises: BrokerUnreachable when there is no time for one."""
        pause, self._pause = self._pause, min(self._pause * 2, 0.5)
        if self._deadline - self._clock() <= pause:
            raise BrokerUnreachable(f"{self._last} (tried until the deadline)") from self._last
        return pause


# `amqp//host` would be a host of that name.
_HALF_A_SCHEME = re.compile(r"(amqps?|pyamqp|rediss?|sentinel|valkeys?)(//|:/(?!/))", re.IGNORECASE)


def _split(url: str) -> list[str]:
    if ";" in url:
        pieces = url.split(";")
        if any("@" in after and "://" not in after for after in pieces[1:]) and "@" not in pieces[0]:
            raise _unescaped()
        return pieces
    pieces = url.split(",")
    return pieces if all("://" in piece for piece in pieces) else [url]


def _parse(url: str, use_ssl: bool | Mapping[str, object] | None, login_method: str | None) -> BrokerAddress:
    scheme = _HALF_A_SCHEME.match(url)
    if scheme is not None:
        raise ConfigurationError(f"a broker URL begins with {scheme[1]}://, and not with {scheme[0]}")
    text = url if "://" in url else f"amqp://{url}"
    try:
        split = urlsplit(text)
    except ValueError:
        raise _unescaped() from None  # brackets that hold no address
    if split.scheme not in SCHEMES:
        raise ConfigurationError(
            f"there is no broker for the URL scheme {split.scheme!r}: amqtask speaks to RabbitMQ "
            "(amqp://user:password@host/vhost) and to Redis (redis://:password@host:6379/0)"
        )
    if "@" not in split.netloc and "@" in text:
        raise _unescaped()
    try:
        port = split.port
    except ValueError:  # its text shows what stands there, which may be of a password
        raise ConfigurationError(
            f"the broker URL's port is not a number from 0 to 65535. If you gave no port: {_unescaped()}"
        ) from None
    query = {name: values[-1] for name, values in parse_qs(split.query, keep_blank_values=True).items()}
    _refuse_unknown("the broker URL has no option", query, _QUERY)
    if isinstance(use_ssl, Mapping):
        _refuse_unknown("broker_use_ssl has no option", use_ssl, {*_TLS_NAMES, *_TLS_ELSEWHERE})
    secure = SCHEMES[split.scheme] or bool(use_ssl)
    tls = _tls({**(use_ssl if isinstance(use_ssl, Mapping) else {}), **query}) if secure else None
    return BrokerAddress(
        host=unquote(split.hostname) if split.hostname else "127.0.0.1",
        port=port or (5671 if secure else 5672),
        user=unquote(split.username) if split.username else "guest",
        password=unquote(split.password) if split.password is not None else "guest",
        vhost=_vhost(split.path),
        tls=tls,
        heartbeat=_heartbeat(query.get("heartbeat")),
        login_method=_login_method(query.get("auth_mechanism"), login_method, tls),
    )


def _login_method(in_url: str | None, in_settings: str | None, tls: TlsOptions | None) -> str:
    name, source = (in_url, "auth_mechanism in the broker URL") if in_url else (in_settings, "broker_login_method")
    method = _LOGIN_METHODS.get((name or PLAIN).lower())
    if method is None:
        raise ConfigurationError(f"{source} is {printable(str(name), 50)!r}, and can be PLAIN, AMQPLAIN or EXTERNAL")
    if method == EXTERNAL and (tls is None or not tls.certfile):
        raise ConfigurationError(
            f"{source} is EXTERNAL, a login by certificate: that needs amqps:// (or broker_use_ssl), certfile and keyfile"
        )
    return method


def _unescaped() -> ConfigurationError:
    """The error for a URL whose login has an unescaped character. No part of the login is shown."""
    return ConfigurationError(
        "the user or password in broker_url holds a character that ends it too early: such characters are percent-encoded "
        f"({_ESCAPES}; urllib.parse.quote(password, safe='') does it)"
    )


def _refuse_unknown(complaint: str, names: Iterable[object], known_names: Collection[str]) -> None:
    for name in names:
        if name not in known_names:
            near = near_names(str(name)[:50].removeprefix("ssl_"), known_names)
            hint = (
                f" Did you mean {near[0]!r}?"
                if near
                else f" There are: {', '.join(sorted({*_TLS_NAMES, 'heartbeat'}))}."
            )
            raise ConfigurationError(f"{complaint} {printable(str(name), 50)!r}.{hint}")


def _heartbeat(text: str | None) -> int | None:
    return (
        None if text is None else int(option_types.convert("heartbeat in the broker URL", option_types.HEARTBEAT, text))
    )


def _vhost(path: str) -> str:
    """`amqp://h`, `amqp://h/` and `amqp://h//` all mean the vhost `/`."""
    name = unquote(path[1:]) if path.startswith("/") else unquote(path)
    return str(option_types.convert("the virtual host in the broker URL", option_types.NAME, name or "/"))


def _tls(options: Options) -> TlsOptions:
    fields: dict[str, Any] = {}
    for name, value in options.items():
        target = _TLS_NAMES.get(name)
        if value is None:
            continue
        if target == "verify":
            fields[target] = str(value).lower() not in ("0", "false", "no", "none", "verify_none", "cert_none")
            if isinstance(value, int) and not isinstance(value, bool):
                fields[target] = value != ssl.CERT_NONE
        elif target is not None:
            fields[target] = value
    return TlsOptions(**fields)


# -- `dev://`: the broker that `amqtask dev` serves on this machine. AMQP in all but the address, and what stands beside it.

# Where RabbitMQ would be: what names no broker, or the one on this machine, finds it there without a word.
DEV_HOST, DEV_PORT = "127.0.0.1", 5672


class DevAddress(BrokerAddress):
    """Any login is taken."""

    @property
    def safe_url(self) -> str:
        """The URL."""
        return f"dev://{self.host}:{self.port}"

    @property
    def question(self) -> str:
        """What to look at when nothing answers there."""
        return "Does `amqtask dev` run, with this port?"


def dev_address(url: str) -> DevAddress:
    """What `dev://`, `dev://:PORT` or `dev://HOST:PORT` names. Raises: ConfigurationError."""
    try:
        split = urlsplit(url)
        return DevAddress(host=split.hostname or DEV_HOST, port=split.port or DEV_PORT)
    except ValueError:
        raise ConfigurationError(f"the broker URL {url!r} should look like dev:// or dev://:5673") from None
