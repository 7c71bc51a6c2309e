"""Which Redis a URL and settings name together, and what connections to it are made with."""

from __future__ import annotations

from typing import Any

import pytest

from amqtask.exceptions import ConfigurationError
from amqtask.transport.redis.servers import client_arguments, deployment_of


@pytest.mark.parametrize(
    ("url", "settings", "name"),
    [
        ("redis://", {}, "redis://localhost:6379/0"),
        ("redis://", {"redis_host": "h", "redis_port": 5, "redis_db": 2}, "redis://h:5/2"),
        ("redis", {"redis_host": "h"}, "redis://h:6379/0"),
        ("redis://other:1/3", {"redis_host": "h", "redis_db": 2}, "redis://other:1/3"),
        ("redis://:secret@h/1", {"redis_backend_use_ssl": {"ssl_ca_certs": "ca.pem"}}, "rediss://h:6379/1"),
        ("redis+cluster://:secret@a:1;redis+cluster://b:2", {}, "cluster redis://a:1, redis://b:2"),
        (
            "redis+cluster://:secret@a:1",
            {"redis_backend_use_ssl": {"ssl_ca_certs": "ca.pem"}},
            "cluster rediss://a:1",
        ),
    ],
)
def test_url_and_settings_name_a_place(url: str, settings: dict[str, Any], name: str) -> None:
    assert deployment_of(url, {}, 4.0, settings).name == name


def test_sentinels_are_named_with_their_master() -> None:
    deployment = deployment_of("sentinel://:secret@a:1/3;sentinel://b", {"master_name": "shop"}, 4.0)

    assert deployment.name == "master shop of sentinel://a:1, sentinel://b:26379"


@pytest.mark.parametrize(
    "url", ["redis://:secret@h/x", "sentinel://:secret@a:1/3;sentinel://b/main", "rediss://h:1/0/1"]
)
def test_a_database_that_is_no_number_is_an_error(url: str) -> None:
    with pytest.raises(ConfigurationError, match="stands the number of a database") as error:
        deployment_of(url, {"master_name": "shop"}, 4.0)

    assert "secret" not in str(error.value)


def test_transport_options_win_over_settings_and_these_over_what_we_take() -> None:
    settings = {"redis_socket_timeout": 9.0, "redis_max_connections": 7, "redis_password": None}

    found = client_arguments({"max_connections": 3}, 4.0, settings)

    assert (found["socket_connect_timeout"], found["socket_timeout"], found["max_connections"]) == (4.0, 9.0, 3)
    assert "password" not in found
