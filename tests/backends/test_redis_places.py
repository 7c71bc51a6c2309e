"""Which Redis a URL and settings name together, and what connections to it are made with."""

from __future__ import annotations

from typing import Any

import pytest

from amqtask import AmqTask
from amqtask.backends.redis import RedisBackend
from amqtask.exceptions import ConfigurationError
from amqtask.flow.redis import RedisStore
from amqtask.transport.redis.servers import client_arguments, deployment_of


@pytest.mark.parametrize(
    ("url", "settings", "name"),
    [
        ("redis://", {}, "redis://localhost:6379/0"),
        ("redis://", {"redis_host": "h", "redis_port": 5, "redis_db": 2}, "redis://h:5/2"),
        ("redis", {"redis_host": "h"}, "redis://h:6379/0"),
        ("redis://other:1/3", {"redis_host": "h", "redis_db": 2}, "redis://other:1/3"),
        ("redis://:secret@h/1", {"redis_backend_use_ssl": {"ssl_ca_certs": "ca.pem"}}, "rediss://h:6379/1"),
        ("valkey://:secret@h:1/2", {}, "redis://h:1/2"),
        ("valkeys://h:1/2", {}, "rediss://h:1/2"),
        ("redis+socket://:secret@/run/redis.sock?virtual_host=2", {}, "unix:///run/redis.sock"),
        ("redis+cluster://:secret@a:1;redis+cluster://b:2", {}, "cluster redis://a:1, redis://b:2"),
        ("valkey+cluster://:secret@a:1;b:2", {}, "cluster redis://a:1, redis://b:2"),
        (
            "redis+cluster://:secret@a:1",
            {"redis_backend_use_ssl": {"ssl_ca_certs": "ca.pem"}},
            "cluster rediss://a:1",
        ),
    ],
)
def test_url_and_settings_name_a_place(url: str, settings: dict[str, Any], name: str) -> None:
    assert deployment_of(url, {}, 4.0, settings).name == name


@pytest.mark.parametrize("option", ["timeout=20", "visibility_timeout=30", "ssl_cert_reqs=none"])
def test_an_option_that_a_url_cannot_have_is_an_error_that_names_it(option: str) -> None:
    with pytest.raises(ConfigurationError, match=option.partition("=")[0]) as error:
        deployment_of(f"redis://:secret@h/1?{option}", {}, 4.0)

    assert "secret" not in str(error.value)


@pytest.mark.parametrize("url", ["redis://h/1", "redis+socket:///run/redis.sock"])
def test_options_of_a_url_are_read_as_kombu_and_we_need_them(url: str) -> None:
    client = deployment_of(f"{url}?virtual_host=4&decode_responses=True&socket_timeout=3", {}, 4.0).client()

    options = client.connection_pool.connection_kwargs
    assert (options["db"], options["socket_timeout"], options.get("decode_responses")) == (4, 3.0, None)


def test_a_user_is_not_taken_for_a_scheme() -> None:
    tls = {"redis_backend_use_ssl": {"ssl_ca_certs": "ca.pem"}}

    client = deployment_of("redis://redis:redis:@h/1", {}, 4.0, tls).client()

    assert [client.connection_pool.connection_kwargs[name] for name in ("username", "password")] == ["redis", "redis:"]


@pytest.mark.parametrize(
    "url",
    [
        *(
            "redis://h/1",
            "redis+socket:///run/redis.sock?virtual_host=2",
            "unix:///run/redis.sock",
            "redis+cluster://a:1;b:2",
        ),
        *("valkey://h/1", "valkeys://h/1", "valkey+socket:///run/valkey.sock", "valkey+cluster://a:1;b:2"),
    ],
)
def test_what_names_the_broker_names_results_chords_and_locks_too(url: str) -> None:
    app = AmqTask("one", broker=url, backend=url, set_as_current=False)
    other = AmqTask("no results", broker=url, set_as_current=False)

    assert isinstance(app.backend, RedisBackend)
    assert isinstance(other.runtime.chord_store, RedisBackend)
    assert isinstance(other.runtime.flow_store, RedisStore)
    assert isinstance(
        AmqTask("locks", broker="memory://", flow_store=url, set_as_current=False).runtime.flow_store, RedisStore
    )


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
