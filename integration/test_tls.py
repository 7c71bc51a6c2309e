"""TLS as operators set it up: a private authority, a broker that asks for client certificates, and each mistake by name."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import pytest
import trustme

from amqtask import AmqTask
from amqtask.cli.broker import open_admin
from amqtask.exceptions import AccessRefused, BrokerUnreachable, ConfigurationError
from integration.nodes import RabbitNode, free_port, rabbitmq_installed
from integration.waiting import PATIENT
from integration.workers import WorkerProcess

SAMPLE = "integration.apps.sample"


@dataclass(frozen=True)
class Secured:
    """A node that takes nobody without a certificate of its authority."""

    port: int
    cafile: Path
    certfile: Path
    keyfile: Path
    strange_cafile: Path
    node: RabbitNode
    # The certificates of a user that the broker knows, and of one that it does not know.
    users: dict[str, dict[str, Path]]

    def url(self, **options: Path | str) -> str:
        """Its URL with these TLS options."""
        return f"amqps://guest:guest@localhost:{self.port}/?{urlencode(options)}"

    def external_url(self, user: str) -> str:
        """For a login by this user's certificate."""
        return f"amqps://localhost:{self.port}/?{urlencode({**self.users[user], 'auth_mechanism': 'external'})}"

    @property
    def good_url(self) -> str:
        """With everything it asks for."""
        return self.url(cafile=self.cafile, certfile=self.certfile, keyfile=self.keyfile)


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    if not rabbitmq_installed():
        pytest.skip("rabbitmq-server is not installed")
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    trustme.CA().cert_pem.write_to_path(folder / "strange.pem")
    for name in ("localhost", "client", "worker-1", "nobody"):
        issued = authority.issue_cert(name, common_name=name)
        issued.private_key_pem.write_to_path(folder / f"{name}.key")
        issued.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
    node, port = RabbitNode("tls"), free_port()
    node.configure(
        f"""
        listeners.ssl.default = 127.0.0.1:{port}
        ssl_options.cacertfile = {folder / "ca.pem"}
        ssl_options.certfile = {folder / "localhost.pem"}
        ssl_options.keyfile = {folder / "localhost.key"}
        ssl_options.verify = verify_peer
        ssl_options.fail_if_no_peer_cert = true
        auth_mechanisms.1 = PLAIN
        auth_mechanisms.2 = EXTERNAL
        ssl_cert_login_from = common_name
        """
    )
    node.enable("rabbitmq_auth_mechanism_ssl")
    users = {
        name: {"cafile": folder / "ca.pem", "certfile": folder / f"{name}.pem", "keyfile": folder / f"{name}.key"}
        for name in ("worker-1", "nobody")
    }
    try:
        node.start()
        node.ctl("add_user", "worker-1", "unused")
        node.ctl("clear_password", "worker-1")
        node.ctl("set_permissions", "worker-1", ".*", ".*", ".*")
        yield Secured(
            port, folder / "ca.pem", folder / "client.pem", folder / "client.key", folder / "strange.pem", node, users
        )
    finally:
        node.remove()


def app_at(url: str) -> AmqTask:
    return AmqTask("tls", broker=url, backend="rpc://", **PATIENT, set_as_current=False)


def refused_at(url: str) -> AmqTask:
    """An application whose calls fail: each takes all the time it is given, as a broker may come back."""
    app = app_at(url)
    app.conf.broker_publish_timeout = app.conf.broker_connection_timeout = 6.0
    return app


def test_producer_worker_and_results_speak_tls(secured: Secured) -> None:
    environment = {"AMQTASK_BROKER_URL": secured.good_url}
    with (
        app_at(secured.good_url) as app,
        WorkerProcess(SAMPLE, "-Q", "tls", "-P", "prefork", "-c", "1", environment=environment) as worker,
    ):
        with app.pipeline():
            results = [app.send_task("sample.add", (number, 1), queue="tls") for number in range(200)]
        assert [result.get(timeout=90) for result in results] == list(range(1, 201))
        large = app.send_task("sample.add", ("x" * 500_000, "y"), queue="tls")
        assert large.get(timeout=90) == "x" * 500_000 + "y"
        assert worker.stop() == 0


def test_the_async_publisher_speaks_tls(secured: Secured) -> None:
    async def publish() -> str:
        result = await app.asend_task("any.task", queue="tls-async")
        await app.async_publisher.close()
        return result.id

    with app_at(secured.good_url) as app:
        assert asyncio.run(publish())


def test_celery_s_broker_use_ssl_is_taken(secured: Secured) -> None:
    options = {"ca_certs": str(secured.cafile), "certfile": str(secured.certfile), "keyfile": str(secured.keyfile)}
    app = AmqTask(
        "tls",
        broker=f"amqp://guest:guest@localhost:{secured.port}//",
        broker_use_ssl=options,
        **PATIENT,
        set_as_current=False,
    )
    with app:
        assert app.send_task("any.task", queue="tls-settings").id


def test_a_broker_of_another_authority_is_not_trusted(secured: Secured) -> None:
    url = secured.url(cafile=secured.strange_cafile, certfile=secured.certfile, keyfile=secured.keyfile)
    with refused_at(url) as app, pytest.raises(BrokerUnreachable, match=r"(?i)certificate verify failed"):
        app.send_task("any.task")


def test_a_broker_with_another_name_is_not_trusted(secured: Secured) -> None:
    url = secured.good_url.replace("@localhost:", "@127.0.0.1:")
    with refused_at(url) as app, pytest.raises(BrokerUnreachable, match=r"(?i)certificate"):
        app.send_task("any.task")


def test_without_a_client_certificate_the_broker_hangs_up_and_the_error_says_so(secured: Secured) -> None:
    with (
        refused_at(secured.url(cafile=secured.cafile)) as app,
        pytest.raises(BrokerUnreachable, match=r"(?i)certificate"),
    ):
        app.send_task("any.task")


def publish_in(app: AmqTask, *, awaits: bool) -> None:
    """One call, of a coroutine or not."""

    async def publish() -> None:
        await app.asend_task("any.task")

    if awaits:
        asyncio.run(publish())
    else:
        app.send_task("any.task")


@pytest.mark.parametrize("awaits", [False, True], ids=["blocking", "async"])
def test_a_port_that_speaks_tls_is_told_to_who_comes_without(secured: Secured, awaits: bool) -> None:
    with (
        refused_at(f"amqp://guest:guest@localhost:{secured.port}/") as app,
        pytest.raises(BrokerUnreachable, match="Perhaps TLS is spoken there"),
    ):
        publish_in(app, awaits=awaits)


@pytest.mark.parametrize("awaits", [False, True], ids=["blocking", "async"])
def test_a_port_that_speaks_no_tls_is_told_to_who_comes_with_it(secured: Secured, awaits: bool) -> None:
    url = secured.node.url.replace("amqp://", "amqps://")
    with refused_at(url) as app, pytest.raises(BrokerUnreachable, match="No TLS is spoken there"):
        publish_in(app, awaits=awaits)


@pytest.mark.parametrize("with_tls", [False, True], ids=["plain", "TLS"])
def test_a_worker_is_told_the_same(secured: Secured, with_tls: bool) -> None:
    with_it, without_it = (
        secured.node.url.replace("amqp://", "amqps://"),
        f"amqp://guest:guest@localhost:{secured.port}/",
    )
    url = with_it if with_tls else without_it
    with WorkerProcess(SAMPLE, "-Q", "tls", environment={"AMQTASK_BROKER_URL": url}).start(wait=False) as worker:
        worker.await_log("No TLS is spoken there" if with_tls else "Perhaps TLS is spoken there")


def test_a_certificate_that_cannot_be_read_is_named(secured: Secured) -> None:
    url = secured.url(cafile=secured.cafile.with_name("missing.pem"))
    with app_at(url) as app, pytest.raises(ConfigurationError, match=r"missing\.pem"):
        app.send_task("any.task")


# -- login by certificate


def test_producer_worker_and_results_log_in_by_certificate(secured: Secured) -> None:
    url = secured.external_url("worker-1")
    with (
        app_at(url) as app,
        WorkerProcess(SAMPLE, "-Q", "external", "-P", "solo", environment={"AMQTASK_BROKER_URL": url}) as worker,
    ):
        assert app.send_task("sample.add", (1, 2), queue="external").get(timeout=90) == 3
        assert app.control.ping(timeout=10)
        assert worker.stop() == 0


def test_celery_s_setting_logs_in_by_certificate_in_coroutines_too(secured: Secured) -> None:
    tls = {"ca_certs" if name == "cafile" else name: str(path) for name, path in secured.users["worker-1"].items()}
    app = AmqTask(
        "tls",
        broker=f"amqp://localhost:{secured.port}//",
        broker_use_ssl=tls,
        broker_login_method="EXTERNAL",
        **PATIENT,
        set_as_current=False,
    )

    async def publish() -> str:
        result = await app.asend_task("any.task", queue="tls-async")
        await app.async_publisher.close()
        return result.id

    with app:
        assert app.send_task("any.task", queue="tls-settings").id
        assert asyncio.run(publish())
        with open_admin(app) as admin:
            assert admin.count("tls-settings") >= 1


def call(app: AmqTask, *, is_async: bool) -> None:
    async def publish() -> None:
        try:
            await app.asend_task("any.task")
        finally:
            await app.async_publisher.close()

    if is_async:
        asyncio.run(publish())
    else:
        app.send_task("any.task")


@pytest.mark.parametrize("is_async", [False, True])
def test_a_certificate_of_nobody_is_refused_by_name(secured: Secured, is_async: bool) -> None:
    said = r"certificate .*nobody\.pem.*ssl_cert_login_from"
    with refused_at(secured.external_url("nobody")) as app, pytest.raises(AccessRefused, match=said):
        call(app, is_async=is_async)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_broker_that_offers_no_login_by_certificate_is_told_what_it_lacks(secured: Secured, is_async: bool) -> None:
    secured.node.ctl("eval", "application:set_env(rabbit, auth_mechanisms, ['PLAIN']).")
    try:
        with (
            refused_at(secured.external_url("worker-1")) as app,
            pytest.raises(AccessRefused, match="rabbitmq_auth_mechanism_ssl"),
        ):
            call(app, is_async=is_async)
    finally:
        secured.node.ctl("eval", "application:set_env(rabbit, auth_mechanisms, ['PLAIN', 'EXTERNAL']).")
