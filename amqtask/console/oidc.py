"""Log in by OpenID Connect: the provider says who it is, a signed cookie remembers it. Authlib speaks to the provider.

https://openid.net/specs/openid-connect-core-1_0.html, the authorization code flow with PKCE; Authlib checks state, nonce, and the
id token's signature, issuer, audience and times.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from authlib.integrations.starlette_client import OAuth
from starlette.middleware import Middleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from amqtask.console.access import GROUP, USER, Denied, User, local_path, users_in
from amqtask.exceptions import ConfigurationError
from amqtask.ground.printable import bounded_logger, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from starlette.requests import Request

    Handler = Callable[[Request], Coroutine[Any, Any, Response]]

logger = bounded_logger("amqtask.console")
COOKIE = "amqtask_console"
EMAIL = "email"
# Seconds that a login lasts. The cookie cannot be taken back before.
LOGIN_SECONDS = 8 * 3600


# Of those who speak to the provider: their errors share no base.
_PARTNERS = ("authlib", "joserfc", "httpx", "httpx2", "httpcore", "httpcore2")


@contextmanager
def _telling(status: int, text: str) -> Iterator[None]:
    """Turn what goes wrong with the provider, or with what it says, into Denied."""
    try:
        yield
    except Exception as error:
        is_theirs = type(error).__module__.partition(".")[0] in _PARTNERS
        if not (is_theirs or isinstance(error, (OSError, ValueError, KeyError))):
            raise
        raise Denied(status, f"{text}: {error or type(error).__name__}") from error


@dataclass(frozen=True, slots=True)
class Named:
    """The users and groups that a setting names, as `user:ann` and `group:ops`.

    Where users are called by their addresses, a name with an @ is a user's and any other a group's. Else a user may have chosen
    the name of a group, and each entry says which it means.
    """

    users: frozenset[str]
    groups: frozenset[str]

    @classmethod
    def of(cls, setting: str, entries: Collection[str], user_claim: str) -> Named:
        """Raises: ConfigurationError."""
        if isinstance(entries, str):
            raise ConfigurationError(f"{setting} is a list of users and groups, not the text {entries!r}")
        names = frozenset(cls._said(setting, entry, user_claim) for entry in entries)
        groups = frozenset(name for name in names if name.startswith(GROUP))
        return cls(users_in(names), frozenset(name.removeprefix(GROUP) for name in groups))

    @staticmethod
    def _said(setting: str, entry: str, user_claim: str) -> str:
        if entry.startswith((USER, GROUP)):
            return entry
        if user_claim != EMAIL:
            raise ConfigurationError(
                f"{setting}: say {USER}{entry} or {GROUP}{entry}; with user_claim {user_claim!r} {entry!r} may be either"
            )
        return (USER if "@" in entry else GROUP) + entry

    def has(self, user: str | None, groups: frozenset[str]) -> bool:
        """Whether it names the user (None: one whose name is not certain), or one of these groups."""
        return user in self.users or not self.groups.isdisjoint(groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class OidcOptions:
    """The setting `console_oidc`. `viewers` and `operators` None: all that the provider lets in. `emails_are_verified`: also
    where the provider does not say so. `url` is the console's address as browsers see it (None: as they asked); `secret` signs
    cookies (None: until the process ends)."""

    issuer: str
    client_id: str
    client_secret: str = field(repr=False)
    scope: str = "openid email profile"
    user_claim: str = EMAIL
    groups_claim: str = "groups"
    emails_are_verified: bool = False
    viewers: Named | None = None
    operators: Named | None = None
    url: str | None = None
    secret: str | None = field(default=None, repr=False)

    @classmethod
    def of(cls, written: Mapping[str, Any], operators: frozenset[str] | None) -> OidcOptions:
        """From the settings. Raises: ConfigurationError."""
        options = {one.name for one in fields(cls)} - {"operators"}
        if strange := sorted(set(written) - options):
            raise ConfigurationError(f"console_oidc has no {', '.join(strange)}; it has {', '.join(sorted(options))}")
        if missing := [name for name in ("issuer", "client_id", "client_secret") if not written.get(name)]:
            raise ConfigurationError(f"console_oidc needs {', '.join(missing)}")
        claim, viewers = written.get("user_claim", EMAIL), written.get("viewers")
        named = {
            "viewers": None if viewers is None else Named.of("console_oidc's viewers", viewers, claim),
            "operators": None if operators is None else Named.of("console_operators", operators, claim),
        }
        return cls(**{**written, **named})


class OidcLogin:
    """The pages /login, /login/done and /logout, and who is logged in."""

    def __init__(self, options: OidcOptions) -> None:
        self._options = options
        oauth: Any = OAuth()
        self._provider = oauth.register(
            "provider",
            client_id=options.client_id,
            client_secret=options.client_secret,
            server_metadata_url=f"{options.issuer.rstrip('/')}/.well-known/openid-configuration",
            client_kwargs={"scope": options.scope, "code_challenge_method": "S256"},
        )

    def middleware(self) -> Middleware:
        """Keeps sessions in a signed cookie that other sites' forms do not bring."""
        return Middleware(
            SessionMiddleware,
            secret_key=self._options.secret or secrets.token_hex(32),
            session_cookie=COOKIE,
            max_age=LOGIN_SECONDS,
            same_site="lax",
            https_only=(self._options.url or "").startswith("https://"),
        )

    def routes(self, guarded: Callable[[Handler], Handler]) -> list[Route]:
        """Its addresses; `guarded` turns errors into answers."""
        return [
            Route("/login", guarded(self._begin)),
            Route("/login/done", guarded(self._done)),
            Route("/logout", guarded(self._end), methods=["POST"]),
        ]

    def visitor(self, session: Mapping[str, Any]) -> User | None:
        """Who is logged in."""
        user, until = session.get("user"), session.get("until")
        if not isinstance(user, str) or not isinstance(until, (int, float)) or until < time.time():
            return None
        return User(user, session.get("operates") is True)

    def _root(self, request: Request) -> str:
        return (self._options.url or str(request.base_url)).rstrip("/")

    async def _begin(self, request: Request) -> Response:
        request.session.clear()
        request.session["next"] = local_path(request.query_params.get("next", "/"))
        with _telling(502, f"the OpenID provider {self._options.issuer} cannot be asked"):
            answer: Response = await self._provider.authorize_redirect(request, f"{self._root(request)}/login/done")
        return answer

    async def _done(self, request: Request) -> Response:
        with _telling(403, "the login did not work"):
            token = await self._provider.authorize_access_token(request)
        user = self._user(token.get("userinfo") or {})
        target = local_path(request.session.get("next", "/"))
        request.session.clear()
        request.session.update(user=user.name, operates=user.may_change, until=time.time() + LOGIN_SECONDS)
        return RedirectResponse(f"{self._root(request)}{target}", 303)

    def _user(self, claims: Mapping[str, Any]) -> User:
        """Raises: Denied."""
        options = self._options
        name = claims.get(options.user_claim)
        if not isinstance(name, str) or not name:
            raise Denied(403, f"the provider says no {options.user_claim}")
        is_certain = options.user_claim != EMAIL or self._is_verified(name, claims.get("email_verified"))
        listed = claims.get(options.groups_claim)
        groups = (
            frozenset(group for group in listed if isinstance(group, str)) if isinstance(listed, list) else frozenset()
        )
        rules = [rule for rule in (options.viewers, options.operators) if rule is not None]
        if not is_certain and any(rule.has(name, frozenset()) for rule in rules):
            logger.warning(
                "console: %s has no rights by that address, as the provider does not say that it is verified (see "
                "emails_are_verified)",
                printable(name),
            )
        user = name if is_certain else None
        if options.viewers is not None and not any(rule.has(user, groups) for rule in rules):
            raise Denied(403, f"{name} may not see this console")
        return User(name, options.operators is None or options.operators.has(user, groups))

    def _is_verified(self, address: str, claim: object) -> bool:
        """Raises: Denied when the provider says that it is not."""
        if claim is None:
            return self._options.emails_are_verified
        if claim not in (True, "true"):  # some providers write it as a text
            raise Denied(403, f"the provider has not verified the address {address}")
        return True

    async def _end(self, request: Request) -> Response:
        request.session.clear()
        return RedirectResponse(f"{self._root(request)}/", 303)
