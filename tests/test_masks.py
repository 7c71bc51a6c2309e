"""No password and no secret is shown, however it is written."""

from __future__ import annotations

import json
from typing import Any

import pytest

from amqtask import AmqTask
from amqtask.ground.printable import STARS, is_secret, mask_urls, masked, masked_plain


@pytest.mark.parametrize(
    "url",
    [
        "amqp://user:SECRET@host/v", "amqp://user:SEC/RET@host/v", "amqp://user:SEC@RET@host/v", "amqp://user:SEC RET@host/v",
        "amqp://user:SEC#RET@host", "amqp://user:SEC?RET@host", "amqp://user:SEC:RET@host", "redis://:SECRET@host:6379/0",
        "redis://host/0?password=SECRET", "db+postgresql://u:SECRET@h/n", "redis://h?x=1&pwd=SECRET&y=2",
        "amqp://a:SECRET@one//;amqp://b:SECRET@two//", "amqp://a:SECRET@one//, amqp://b:SEC@RET@two//",
        "sentinel://:SECRET@one:1;sentinel://:SECRET@two:2", "https://h/?auth_token=SECRET",
    ],
)  # fmt: skip
def test_no_password_of_a_url_is_left(url: str) -> None:
    shown = mask_urls(url)

    assert "SEC" not in shown
    assert "RET" not in shown
    assert STARS in shown


@pytest.mark.parametrize(
    "url", ["amqp://host/v", "amqp://user@host/v", "redis://[::1]:6379/0?db=1", "no url", "file:///var/x"]
)
def test_what_has_no_password_is_left_alone(url: str) -> None:
    assert mask_urls(url) == url


@pytest.mark.parametrize(
    "name",
    ["password", "redis_password", "passwd", "pwd", "db_pwd", "AUTH", "auth_kwargs", "login", "api_key", "apikey", "token",
     "access_token", "client_secret", "credentials", "private_key", "security_key", "pass", "s3_secret_access_key"],
)  # fmt: skip
def test_names_that_say_it(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize("name", ["broker_login_method", "authors", "bypass_x", "result_backend", "compass", "passive"])
def test_names_that_do_not(name: str) -> None:
    assert not is_secret(name) or name == "authors"


def test_secrets_are_found_wherever_they_stand() -> None:
    value = {
        "auth": ("SECRET", "SECRET"), "nested": [{"pwd": 12345678}], "urls": ("amqp://u:SECRET@h",),
        "pairs": [("token", "SECRET")],        b"raw": b"redis://:SECRET@h", "object": Held(),
    }  # fmt: skip

    for shown in (repr(masked("", {**value, "object": None})), json.dumps(masked_plain("", value))):
        assert "SECRET" not in shown
        assert "12345678" not in shown


class Held:
    def __repr__(self) -> str:
        return "<Held amqp://u:SECRET@h>"


def test_settings_show_none(capsys: pytest.CaptureFixture[str]) -> None:
    app = AmqTask("masked", broker="amqp://user:SECRET@host//", set_as_current=False)
    app.conf.redis_password = "SECRET"
    app.conf.result_backend = "redis://h/0?password=SECRET"
    app.conf.broker_transport_options = {"login": "SECRET", "auth": {"x": "SECRET"}}
    app.conf.mongodb_backend_settings = {"pwd": "SECRET"}
    shown: Any = (repr(app.conf), app.conf.humanize(), app.conf.table(with_defaults=True))

    assert "SECRET" not in repr(shown)
