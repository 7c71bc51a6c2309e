"""Who may see and do what. Without users the console is for this machine only.

A request that changes something must come from a page of the console itself: browsers say where it comes from (`Sec-Fetch-Site`,
else `Origin`: https://cheatsheetseries.owasp.org/cheatsheets/Cross-Site_Request_Forgery_Prevention_Cheat_Sheet.html). A program
says neither, and has no cookies or kept logins that a page elsewhere could use.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from urllib.parse import SplitResult, urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.middleware import Middleware
    from starlette.routing import Route

_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
# scrypt's parameters: some 20 ms and 16 MB a login.
_COST, _BLOCK, _PARALLEL = 2**14, 8, 1
# The hash of no password, for names that nobody has: an answer that came sooner would tell which names there are.
_NOBODYS = f"scrypt${bytes(16).hex()}${bytes(64).hex()}"


class Denied(Exception):
    """The request may not do that; `status` is the HTTP status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def hashed(password: str) -> str:
    """A password as `console_users` has it: scrypt$salt$hash, in hexadecimal digits."""
    salt = os.urandom(16)
    return f"scrypt${salt.hex()}${_scrypt(password, salt).hex()}"


def _scrypt(password: str, salt: bytes) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, n=_COST, r=_BLOCK, p=_PARALLEL)


def fits(password: str, kept: str) -> bool:
    """Whether it is the password that was hashed."""
    try:
        name, salt, digest = kept.split("$")
        expected = bytes.fromhex(digest)
        return name == "scrypt" and hmac.compare_digest(_scrypt(password, bytes.fromhex(salt)), expected)
    except ValueError:
        return False


class User(NamedTuple):
    """Who asks, and whether he may do more than look."""

    name: str
    may_change: bool


# How an entry of `console_operators` says which it is; one that says neither is a user where there are no groups.
USER, GROUP = "user:", "group:"


def users_in(entries: Collection[str]) -> frozenset[str]:
    """The users that they name: `ann` or `user:ann`, and not `group:ops`."""
    return frozenset(entry.removeprefix(USER) for entry in entries if not entry.startswith(GROUP))


class Login(Protocol):
    """Pages where people log in, and sessions that remember it."""

    def middleware(self) -> Middleware:
        """What keeps sessions."""

    def routes(self, guarded: Callable[[Any], Any]) -> list[Route]:
        """The pages; `guarded` turns errors into answers."""

    def visitor(self, session: Mapping[str, Any]) -> User | None:
        """Who is logged in."""


def local_path(target: object) -> str:
    """The path, if it leads to no other site; else the first page."""
    is_own = isinstance(target, str) and target.startswith("/") and not target.startswith(("//", "/\\"))
    return str(target) if is_own else "/"


@dataclass(slots=True)
class Access:
    """`users` are names and hashed passwords; `header` is what a proxy writes the user's name in; `operators` name who may change
    things (None: all users); `login` has people log in by a page (users then are for programs)."""

    users: Mapping[str, str] = field(default_factory=dict)
    header: str | None = None
    operators: frozenset[str] | None = None
    login: Login | None = None
    # Logins that were found right: a hash is slow on purpose, and each request brings the password.
    _known: dict[bytes, str] = field(default_factory=dict)

    @property
    def is_local_only(self) -> bool:
        """Whether only this machine may come."""
        return not self.users and not self.header and self.login is None

    def user(self, headers: Mapping[str, str], session: Mapping[str, Any] | None = None) -> User:
        """Who asks. Raises: Denied."""
        if self.login is not None and not self.header and "authorization" not in headers:
            visitor = self.login.visitor(session or {})
            if visitor is None:
                raise Denied(401, "log in")
            return visitor
        name = self._name(headers)
        return User(name, self.operators is None or name in users_in(self.operators))

    def _name(self, headers: Mapping[str, str]) -> str:
        if self.header:
            name = headers.get(self.header.lower(), "").strip()
            if not name:
                raise Denied(403, f"the proxy in front of the console says no user in {self.header}")
            return name
        if self.users or self.login is not None:
            return self._logged_in(headers.get("authorization", ""))
        if _split(f"//{headers.get('host', '')}").hostname not in _LOCAL:
            raise Denied(
                403, "without users the console is for http://localhost only"
            )  # another name may be an attacker's
        return "local"

    def _logged_in(self, written: str) -> str:
        scheme, _, encoded = written.partition(" ")
        try:
            name, separator, password = base64.b64decode(encoded, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            scheme, name, separator, password = "", "", "", ""
        if scheme.lower() != "basic" or not separator or not self.users:
            raise Denied(401, "log in")
        kept = self.users.get(name, _NOBODYS)
        ticket = hashlib.sha256(f"{name}:{password}:{kept}".encode()).digest()
        if ticket not in self._known:
            if not fits(password, kept):
                raise Denied(401, "log in")
            self._known[ticket] = name
        return name

    def check_change(self, user: User, headers: Mapping[str, str]) -> None:
        """Raises: Denied for a change that the user may not make, or that another site's page asks for."""
        if not user.may_change:
            raise Denied(403, f"{user.name} may look, and change nothing")
        site, origin = headers.get("sec-fetch-site"), headers.get("origin")
        if site is not None:
            is_own = site in ("same-origin", "none")
        else:
            is_own = origin is None or _split(origin).netloc == headers.get("host")
        if not is_own:
            raise Denied(403, "this request comes from a page of another site")


def _split(url: str) -> SplitResult:
    """What a stranger says is an address; of what is none nothing."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")
