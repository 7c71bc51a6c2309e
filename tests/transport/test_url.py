"""Broker URLs: every form Celery's users write, and no password anywhere it could be read."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import pytest

from amqtask import AmqTask
from amqtask.exceptions import ConfigurationError
from amqtask.transport.url import BrokerAddress, parse_broker_urls


def parse(url: str, **options: Any) -> BrokerAddress:
    (address,) = parse_broker_urls(url, **options)
    return address


@pytest.mark.parametrize(
    ("url", "vhost"),
    [
        ("amqp://h", "/"),
        ("amqp://h/", "/"),
        ("amqp://h//", "/"),
        ("amqp://h/%2F", "/"),
        ("amqp://h/shop", "shop"),
        ("amqp://h//shop", "/shop"),
        ("amqp://h/a%2Fb", "a/b"),
    ],
)
def test_the_path_is_the_virtual_host(url: str, vhost: str) -> None:
    assert parse(url).vhost == vhost


def test_an_address_has_everything_the_url_says() -> None:
    address = parse("amqp://us%40er:p%3Aw@broker.example:5673/shop?heartbeat=30")

    assert (address.host, address.port, address.user, address.password) == ("broker.example", 5673, "us@er", "p:w")
    assert (address.vhost, address.heartbeat, address.tls) == ("shop", 30, None)


def test_what_the_url_leaves_out_has_rabbitmqs_defaults() -> None:
    assert parse("amqp://") == BrokerAddress("127.0.0.1", 5672, "guest", "guest", "/")
    assert parse("localhost") == BrokerAddress("localhost", 5672, "guest", "guest", "/")
    assert parse_broker_urls(None) == parse_broker_urls("pyamqp://guest:guest@127.0.0.1:5672//")


def test_an_ipv6_host_stands_in_brackets() -> None:
    address = parse("amqp://[::1]:5673/")

    assert (address.host, address.port) == ("::1", 5673)
    assert "[::1]:5673" in address.safe_url


def test_a_host_is_percent_decoded_as_the_rest() -> None:
    assert parse("amqp://[fe80::1%25eth0]:5673/").host == "fe80::1%eth0"
    assert parse("amqp://b%C3%BCcher.example/").host == "bücher.example"


def test_a_virtual_host_that_amqp_cannot_say_is_an_error() -> None:
    assert parse(f"amqp://h/{'v' * 255}").vhost == "v" * 255
    with pytest.raises(ConfigurationError, match="virtual host in the broker URL"):
        parse(f"amqp://h/{'é' * 128}")


@pytest.mark.parametrize(
    "urls",
    ["amqp://a;amqp://b", "amqp://a; amqp://b;", "amqp://a,amqp://b", ["amqp://a", "amqp://b"], ["amqp://a;amqp://b"]],
)
def test_several_hosts_keep_their_order(urls: str | list[str]) -> None:
    assert [address.host for address in parse_broker_urls(urls)] == ["a", "b"]


def test_a_comma_in_a_password_is_no_separator() -> None:
    assert parse("amqp://user:a,b@h/").password == "a,b"


@pytest.mark.parametrize(
    "url", ["redis://localhost", "sqs://", "http://h", "amqp://h:port/", "", ";", "amqp://h/?heartbeat=x"]
)
def test_what_is_no_broker_url_is_a_clear_error(url: str) -> None:
    if url == "":
        return  # an empty one means the default
    with pytest.raises(ConfigurationError):
        parse_broker_urls(url)


def test_the_password_is_shown_nowhere() -> None:
    address = parse("amqp://user:secret@h:5672/shop")

    assert "secret" not in repr(address)
    assert address.safe_url == "amqp://user:**@h:5672/shop"


def test_an_error_does_not_show_the_password_either() -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_broker_urls("amqp://user:secret@h:port/")

    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "login",
    [
        "user:sec/ret",
        "user:sec#ret",
        "user:sec?ret",
        "user:sec[ret",
        "user:sec]ret",
        "user:sec;ret",
        "user:5/secret",
        "se/cret",
    ],
)
def test_a_login_that_is_not_escaped_is_hinted_at_and_not_shown(login: str) -> None:
    with pytest.raises(ConfigurationError, match="percent-encoded") as caught:
        parse_broker_urls(f"amqp://{login}@h:5672/v")

    for part in ("sec", "ret"):
        assert part not in str(caught.value)


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("heartbeet=5", "'heartbeat'"),
        ("cacertfle=/x", "'cacertfile'"),
        ("colour=red", "There are"),
        ("heartbeat=-1", "65535"),
    ],
)
def test_an_option_that_a_url_has_not_is_named(query: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        parse(f"amqps://h/?{query}")


def test_options_for_other_clients_are_taken() -> None:
    assert parse("amqp://h/?connection_attempts=3&socket_timeout=5&channel_max=2047").host == "h"


@pytest.mark.parametrize(
    ("use_ssl", "said"),
    [
        ({"ca_cert": "x"}, "'ca_certs'"),
        ({"ssl_ca_certs": "x"}, "'ca_certs'"),
        ({"keyfil": "x"}, "'keyfile'"),
        ({5: 1}, "'5'"),
    ],
)
def test_a_key_that_broker_use_ssl_has_not_is_named(use_ssl: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        parse("amqps://h", use_ssl=use_ssl)


# -- TLS


def test_amqps_checks_certificates_on_its_own_port() -> None:
    address = parse("amqps://h")

    assert address.port == 5671
    assert address.tls is not None
    context = address.tls.context()
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)


def test_the_query_names_certificates() -> None:
    tls = parse("amqps://h/?cacertfile=/ca&certfile=/c&keyfile=/k&server_name_indication=other").tls

    assert tls is not None
    assert (tls.cafile, tls.certfile, tls.keyfile, tls.server_hostname) == ("/ca", "/c", "/k", "other")


@pytest.mark.parametrize("value", ["verify_none", "0", "false", "none", "CERT_NONE"])
def test_the_query_may_turn_checking_off(value: str) -> None:
    tls = parse(f"amqps://h/?verify={value}").tls

    assert tls is not None
    assert tls.context().verify_mode == ssl.CERT_NONE


@pytest.mark.parametrize(
    ("use_ssl", "verify"),
    [
        (True, True),
        ({"cert_reqs": ssl.CERT_REQUIRED}, True),
        ({"cert_reqs": ssl.CERT_NONE}, False),
        ({"cert_reqs": "CERT_NONE"}, False),
        ({"cert_reqs": False}, False),
        ({"cert_reqs": True}, True),
        ({"cert_reqs": None}, True),
    ],
)
def test_celerys_broker_use_ssl_turns_tls_on(use_ssl: Any, verify: bool) -> None:
    address = parse("amqp://h", use_ssl=use_ssl)

    assert address.tls is not None
    assert address.tls.verify is verify
    assert address.port == 5671


def test_celerys_broker_use_ssl_names_certificates() -> None:
    tls = parse("amqp://h", use_ssl={"keyfile": "/k", "certfile": "/c", "ca_certs": "/ca"}).tls

    assert tls is not None
    assert (tls.cafile, tls.certfile, tls.keyfile) == ("/ca", "/c", "/k")


@pytest.mark.parametrize("use_ssl", [None, False, {}])
def test_without_broker_use_ssl_amqp_is_plain(use_ssl: Any) -> None:
    assert parse("amqp://h", use_ssl=use_ssl).tls is None


def test_a_certificate_that_is_not_there_is_named(tmp_path: Path) -> None:
    tls = parse(f"amqps://h/?cafile={tmp_path}/missing.pem").tls

    assert tls is not None
    with pytest.raises(ConfigurationError, match=r"missing\.pem"):
        tls.context()


# -- pika's parameters


def test_the_urls_heartbeat_wins_but_not_over_none_at_all() -> None:
    plain, own = parse("amqp://h"), parse("amqp://h?heartbeat=30")

    assert plain.parameters(heartbeat=60).heartbeat == 60
    assert own.parameters(heartbeat=60).heartbeat == 30
    assert own.parameters(heartbeat=0).heartbeat == 0


def test_parameters_carry_the_address_and_a_name_for_the_operator() -> None:
    parameters = parse("amqp://user:pw@h:5673/shop").parameters(name="me")

    assert (parameters.host, parameters.port, parameters.virtual_host) == ("h", 5673, "shop")
    assert parameters.client_properties["connection_name"] == "me"


# -- how to log in

CERTIFICATES = "cafile=ca.pem&certfile=c.pem&keyfile=c.key"


@pytest.mark.parametrize(
    ("url", "setting", "method"),
    [
        ("amqp://h", None, "PLAIN"),
        ("amqp://h", "AMQPLAIN", "PLAIN"),
        ("amqp://h?auth_mechanism=plain", None, "PLAIN"),
        (f"amqps://h?{CERTIFICATES}&auth_mechanism=external", None, "EXTERNAL"),
        (f"amqps://h?{CERTIFICATES}", "EXTERNAL", "EXTERNAL"),
        (f"amqps://h?{CERTIFICATES}&auth_mechanism=plain", "EXTERNAL", "PLAIN"),
    ],
)
def test_the_url_or_the_setting_says_how_to_log_in(url: str, setting: str | None, method: str) -> None:
    address = parse(url, login_method=setting)

    assert address.login_method == method
    assert method == address.credentials.TYPE
    assert ("guest" in address.safe_url) == (method == "PLAIN")


@pytest.mark.parametrize(
    ("url", "setting", "said"),
    [
        ("amqp://h", "EXTERNAL", "broker_login_method is EXTERNAL.*certfile"),
        ("amqps://h?cafile=ca.pem&auth_mechanism=external", None, "auth_mechanism in the broker URL.*certfile"),
        ("amqp://h", "GSSAPI", "broker_login_method is 'GSSAPI', and can be PLAIN"),
        ("amqp://h?auth_mechanism=kerberos", None, "'kerberos'"),
    ],
)
def test_a_way_to_log_in_that_cannot_be_taken_is_an_error(url: str, setting: str | None, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        parse(url, login_method=setting)


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [
        ("dev://", "127.0.0.1", 5672),
        ("dev://:5673", "127.0.0.1", 5673),
        ("dev://127.0.0.2:7", "127.0.0.2", 7),
    ],
)
def test_the_broker_of_amqtask_dev(url: str, host: str, port: int) -> None:
    app = AmqTask("tests", broker=url, set_as_current=False)

    (address,) = app.broker_addresses
    assert (address.host, address.port) == (host, port)


def test_beside_the_broker_of_amqtask_dev_nothing_needs_to_be_installed() -> None:
    broker = AmqTask("tests", broker="dev://", set_as_current=False).broker

    assert {broker.results_url(url) for url in ("redis://h/1", "cache+memcached://h", "cache+memory://", "rpc://")} == {
        "rpc://"
    }
    kept = ("db+sqlite:///results", "file:///results", "django-db://")
    assert [broker.results_url(url) for url in kept] == list(kept)


def test_a_wrong_url_of_amqtask_dev_is_told() -> None:
    with pytest.raises(ConfigurationError, match="dev://:5673"):
        _ = AmqTask("tests", broker="dev://:port", set_as_current=False).broker_addresses


@pytest.mark.parametrize("url", ["amqp//h", "amqps:/h/vhost", "AMQP//guest:secret@h", "redis//h:6379/0", "rediss:/h"])
def test_half_a_scheme_is_no_host(url: str) -> None:
    with pytest.raises(ConfigurationError, match="a broker URL begins with") as raised:
        parse(url)
    assert "secret" not in str(raised.value)


def test_a_host_may_have_a_schemes_name() -> None:
    assert parse("amqp:5672/shop").vhost == "shop"
    assert parse("redis/shop").host == "redis"
