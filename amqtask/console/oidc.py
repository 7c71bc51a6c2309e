"""Log in by OpenID Connect: the provider says who it is, a signed cookie remembers it. Authlib speaks to the provider.

https://openid.net/specs/openid-connect-core-1_0.html, the authorization code flow with PKCE; Authlib checks state, nonce, and the
id token's signature, issuer, audience and times.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from authlib.integrations.starlette_client import OAuth
from starlette.middleware import Middleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from amqtask.console.access import Denied, User, local_path
from amqtask.exceptions import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from starlette.requests import Request

    Handler = Callable[[Request], Coroutine[Any, Any, Response]]

COOKIE = "amqtask_console"
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


@dataclass(frozen=True, slots=True, kw_only=True)
class OidcOptions:
    """The setting `console_oidc`. `viewers` and `operators` are users or groups; None: all that the provider lets in. `url` is
    the console's address as browsers see it (None: as they asked); `secret` signs cookies (None: until the process ends)."""

    issuer: str
    client_id: str
    client_secret: str = field(repr=False)
    scope: str = "openid email profile"
    user_claim: str = "email"
    groups_claim: str = "groups"
    viewers: frozenset[str] | None = None
    operators: frozenset[str] | None = None
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
        viewers = written.get("viewers")
        values = {**written, "viewers": None if viewers is None else frozenset(viewers), "operators": operators}
        return cls(**values)


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
        # Some providers write it as a text.
        if options.user_claim == "email" and claims.get("email_verified", True) not in (True, None, "true"):
            raise Denied(403, f"the provider has not verified the address {name}")
        groups = claims.get(options.groups_claim)
        names = {name, *(group for group in groups if isinstance(group, str))} if isinstance(groups, list) else {name}
        if options.viewers is not None and not names & (options.viewers | (options.operators or frozenset())):
            raise Denied(403, f"{name} may not see this console")
        return User(name, options.operators is None or bool(names & options.operators))

    async def _end(self, request: Request) -> Response:
        request.session.clear()
        return RedirectResponse(f"{self._root(request)}/", 303)
