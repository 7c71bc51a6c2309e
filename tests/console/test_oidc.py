"""Logging in by OpenID Connect, against a provider on this machine that signs as real ones do."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import httpx
import pytest
import uvicorn
from joserfc import jwt
from joserfc.jwk import RSAKey
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from amqtask.console.access import Access, hashed
from amqtask.console.oidc import OidcLogin, OidcOptions
from amqtask.exceptions import ConfigurationError
from tests.console.test_console import LOCAL, Shown

SETTINGS = {"client_id": "console", "client_secret": "knock"}


class Provider:
    """Logs `claims` in, whoever comes; `signs` is the key that it signs with, `key` the one that it publishes."""

    def __init__(self) -> None:
        self.key = self.signs = RSAKey.generate_key(2048, {"kid": "one"})
        self.claims: dict[str, Any] = {"sub": "1", "email": "ann@shop.example", "groups": ["ops"]}
        self.codes: dict[str, dict[str, str]] = {}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        routes = [
            Route("/.well-known/openid-configuration", self.metadata),
            Route("/authorize", self.authorize),
            Route("/token", self.token, methods=["POST"]),
            Route("/keys", lambda request: JSONResponse({"keys": [self.key.as_dict(private=False)]})),
        ]
        config = uvicorn.Config(
            Starlette(routes=routes), host="127.0.0.1", port=port, log_level="error", lifespan="off"
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)

    def metadata(self, request: Request) -> Response:
        places = {"authorization_endpoint": "/authorize", "token_endpoint": "/token", "jwks_uri": "/keys"}
        told = {name: f"{self.url}{path}" for name, path in places.items()}
        return JSONResponse({"issuer": self.url, "id_token_signing_alg_values_supported": ["RS256"], **told})

    def authorize(self, request: Request) -> Response:
        asked = dict(request.query_params)
        assert asked["code_challenge_method"] == "S256"
        self.codes["code"] = asked
        return RedirectResponse(f"{asked['redirect_uri']}?{urlencode({'code': 'code', 'state': asked['state']})}")

    def token(self, request: Request) -> Response:
        now = int(time.time())
        claims = {
            "iss": self.url, "aud": "console", "iat": now, "exp": now + 60, "nonce": self.codes["code"]["nonce"], **self.claims,
        }  # fmt: skip
        signed = jwt.encode({"alg": "RS256", "kid": "one"}, claims, self.signs)
        return JSONResponse({"access_token": "a", "token_type": "Bearer", "id_token": signed})


@pytest.fixture
def provider() -> Iterator[Provider]:
    made = Provider()
    made.thread.start()
    yield made
    made.server.should_exit = True
    made.thread.join(30)


class Browser:
    """Keeps the console's cookie, and follows to the provider and back by hand."""

    def __init__(self, shown: Shown) -> None:
        self.shown = shown
        self.cookie = ""

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {**options.pop("headers", {}), **({"Cookie": self.cookie} if self.cookie else {})}
        answer = self.shown.client.request(method, path, headers=headers, **options)
        if "set-cookie" in answer.headers:
            self.cookie = answer.headers["set-cookie"].partition(";")[0]
        return answer

    def log_in(self, asked: str = "/failures?since=7d") -> httpx.Response:
        sent = self.ask("GET", asked)
        assert sent.status_code == 303
        away = self.ask("GET", sent.headers["location"])
        for _ in range(100):
            try:
                back = httpx.get(away.headers["location"])
                break
            except httpx.ConnectError:  # it is only starting
                threading.Event().wait(0.05)
        url = urlsplit(back.headers["location"])
        return self.ask("GET", f"{url.path}?{url.query}")


def shown_with(provider: Provider, folder: Path, *, operators: frozenset[str] | None = None, **options: Any) -> Shown:
    written = {"issuer": provider.url, **SETTINGS, **options}
    login = OidcLogin(OidcOptions.of(written, operators))
    return Shown(folder, login=login, operators=operators, users={"robot": hashed("key")})


def test_who_logs_in_comes_back_and_does_what_his_group_may(provider: Provider, tmp_path: Path) -> None:
    shown = shown_with(provider, tmp_path, operators=frozenset({"ops"}))
    browser = Browser(shown)
    assert browser.ask("GET", "/api/tasks").json() == {"error": "log in"}
    assert browser.ask("POST", "/do/pause", data={"queue": "mail"}).status_code == 401

    answer = browser.log_in()
    assert (answer.status_code, answer.headers["location"]) == (303, f"{LOCAL}/failures?since=7d")
    assert "ann@shop.example" in browser.ask("GET", "/failures").text
    assert browser.ask("POST", "/do/pause", data={"queue": "mail"}, headers={"Origin": LOCAL}).status_code == 303
    assert shown.app.control.pauses.read()["mail"].by == "ann@shop.example"
    elsewhere = {"Origin": "https://evil.example"}
    assert browser.ask("POST", "/do/resume", data={"queue": "mail"}, headers=elsewhere).status_code == 403

    browser.ask("POST", "/logout")
    assert browser.ask("GET", "/").status_code == 303
    assert shown.client.get("/api/tasks", auth=("robot", "key")).status_code == 200
    shown.app.close()


def test_who_is_no_operator_changes_nothing_and_who_is_no_viewer_sees_nothing(
    provider: Provider, tmp_path: Path
) -> None:
    shown = shown_with(provider, tmp_path, operators=frozenset({"bob@shop.example"}), viewers=["ops"])
    browser = Browser(shown)
    browser.log_in()
    assert "(looks)" in browser.ask("GET", "/").text
    assert browser.ask("POST", "/do/pause", data={"queue": "mail"}).status_code == 403
    assert shown.app.control.pauses.read() == {}

    provider.claims = {"sub": "2", "email": "eve@elsewhere.example", "groups": "ops"}
    stranger = Browser(shown)
    assert stranger.log_in().status_code == 403
    for unverified in (False, "false", "", 0):
        provider.claims = {"sub": "3", "email": "bob@shop.example", "email_verified": unverified, "groups": ["ops"]}
        assert stranger.log_in().status_code == 403, unverified
    assert stranger.ask("GET", "/").status_code == 303
    shown.app.close()


def may(provider: Provider, folder: Path, claims: dict[str, Any], **options: Any) -> str:
    """What who logs in with these claims may do."""
    provider.claims = {"sub": "4", **claims}
    shown = shown_with(provider, folder, **options)
    browser = Browser(shown)
    status = browser.log_in().status_code
    done = browser.ask("POST", "/do/pause", data={"queue": "mail"}, headers={"Origin": LOCAL}).status_code
    shown.app.close()
    return "nothing" if status == 403 else "look" if done == 403 else "change"


@pytest.mark.parametrize(
    ("entry", "claims", "allowed"),
    [
        ("group:ops", {"preferred_username": "eve", "groups": ["ops"]}, "change"),
        ("group:ops", {"preferred_username": "ops"}, "nothing"),
        ("user:ops", {"preferred_username": "ops"}, "change"),
        ("user:ops", {"preferred_username": "eve", "groups": ["ops"]}, "nothing"),
        ("group:ops", {"preferred_username": "group:ops"}, "nothing"),
    ],
)
def test_a_user_s_name_is_no_group_s(
    provider: Provider, tmp_path: Path, entry: str, claims: dict[str, Any], allowed: str
) -> None:
    entries = {"operators": frozenset({entry}), "viewers": [entry], "user_claim": "preferred_username"}

    assert may(provider, tmp_path, claims, **entries) == allowed


@pytest.mark.parametrize(
    ("entry", "claims", "allowed"),
    [
        ("ops", {"email": "eve@shop.example", "groups": ["ops"]}, "change"),
        ("ops", {"email": "ops", "email_verified": True}, "look"),
        ("bob@shop.example", {"email": "bob@shop.example", "email_verified": True}, "change"),
        ("bob@shop.example", {"email": "eve@shop.example", "groups": ["bob@shop.example"]}, "look"),
    ],
)
def test_with_addresses_as_names_what_has_no_at_sign_is_a_group(
    provider: Provider, tmp_path: Path, entry: str, claims: dict[str, Any], allowed: str
) -> None:
    assert may(provider, tmp_path, claims, operators=frozenset({entry})) == allowed


def test_an_address_counts_when_it_is_verified(provider: Provider, tmp_path: Path) -> None:
    entries = {"operators": frozenset({"user:bob@shop.example"}), "viewers": ["group:staff"]}
    bob = {"email": "bob@shop.example"}

    assert may(provider, tmp_path, bob, **entries) == "nothing"
    assert may(provider, tmp_path, {**bob, "email_verified": None}, **entries) == "nothing"
    assert may(provider, tmp_path, {**bob, "groups": ["staff"]}, **entries) == "look"
    for verified in (True, "true"):
        assert may(provider, tmp_path, {**bob, "email_verified": verified}, **entries) == "change"
    assert may(provider, tmp_path, bob, emails_are_verified=True, **entries) == "change"
    assert may(provider, tmp_path, {**bob, "email_verified": False}, emails_are_verified=True, **entries) == "nothing"


def test_a_name_that_may_be_a_user_s_or_a_group_s_is_refused(provider: Provider) -> None:
    written = {"issuer": provider.url, **SETTINGS, "user_claim": "preferred_username"}
    with pytest.raises(ConfigurationError, match="user:ops or group:ops"):
        OidcOptions.of(written, frozenset({"ops"}))
    with pytest.raises(ConfigurationError, match=r"viewers.*user:staff or group:staff"):
        OidcOptions.of({**written, "viewers": ["staff"]}, None)
    with pytest.raises(ConfigurationError, match=r"viewers.*list"):
        OidcOptions.of({**written, "viewers": "group:staff"}, None)


def test_a_group_s_name_is_no_user_s_of_a_proxy() -> None:
    access = Access(header="X-User", operators=frozenset({"ann", "user:bob", "group:ops"}))

    changing = {
        name for name in ("ann", "bob", "ops", "group:ops", "user:bob") if access.user({"x-user": name}).may_change
    }
    assert changing == {"ann", "bob"}


@pytest.mark.parametrize("wrong", ["signature", "audience", "nonce", "state"])
def test_a_token_that_is_not_right_lets_nobody_in(provider: Provider, tmp_path: Path, wrong: str) -> None:
    shown = shown_with(provider, tmp_path)
    if wrong == "signature":
        provider.signs = RSAKey.generate_key(2048, {"kid": "one"})
    if wrong in ("audience", "nonce"):
        provider.claims |= {"aud": "other"} if wrong == "audience" else {"nonce": "other"}
    browser = Browser(shown)
    answer = browser.ask("GET", "/login/done?code=code&state=x") if wrong == "state" else browser.log_in()

    assert answer.status_code == 403, answer.text
    assert browser.ask("GET", "/").status_code == 303
    shown.app.close()


def test_a_cookie_that_nobody_signed_is_none_and_next_leads_to_no_other_site(
    provider: Provider, tmp_path: Path
) -> None:
    shown = shown_with(provider, tmp_path)
    made_up = {"Cookie": "amqtask_console=eyJ1c2VyIjogImFubiIsICJ1bnRpbCI6IDllOX0=.x.y"}
    assert shown.client.get("/", headers=made_up).status_code == 303
    for target in ("//evil.example", "https://evil.example", "/\\evil.example"):
        browser = Browser(shown)
        answer = _from(browser, target)
        assert answer.headers["location"] == f"{LOCAL}/"
    shown.app.close()


def _from(browser: Browser, target: str) -> httpx.Response:
    browser.log_in()
    browser.cookie = ""
    away = browser.ask("GET", f"/login?{urlencode({'next': target})}")
    assert parse_qs(urlsplit(away.headers["location"]).query)["client_id"] == ["console"]
    url = urlsplit(httpx.get(away.headers["location"]).headers["location"])
    return browser.ask("GET", f"{url.path}?{url.query}")


def test_a_provider_that_is_away_is_said_so(tmp_path: Path) -> None:
    login = OidcLogin(OidcOptions.of({"issuer": "http://127.0.0.1:9", **SETTINGS}, None))
    shown = Shown(tmp_path, login=login)
    answer = shown.client.get("/login")
    assert (answer.status_code, "cannot be asked" in answer.text) == (502, True)
    assert Access(login=login).is_local_only is False
    shown.app.close()


@pytest.mark.parametrize(
    ("written", "told"), [({}, "issuer, client_id, client_secret"), ({"isuer": "x"}, "has no isuer")]
)
def test_settings_that_are_not_right_are_said_so(written: dict[str, str], told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        OidcOptions.of(written, None)
