"""The programs and command lines of the tutorials (docs/tutorials.md), run as their readers run them."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import socket
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from integration.conftest import Broker
from integration.nodes import free_port
from integration.projects import Project
from integration.workers import ROOT, eventually

TUTORIALS = ROOT / "examples" / "tutorials"
UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"


@pytest.fixture(params=["rabbitmq", "redis"])
def project(
    broker_url: str, redis_url: str, rabbit: Broker, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Callable[..., Project]]:
    """A copy of an example, on either broker. They share the default queue, so it goes before and after each test."""
    own_database = f"{redis_url.rpartition('/')[0]}/14"
    broker = broker_url if request.param == "rabbitmq" else own_database

    def clean() -> None:
        for queue in ("amqtask", "amqtask.dead", "cma_queue", "cma_queue.dead"):
            rabbit.channel().queue_delete(queue)
        with redis.Redis.from_url(own_database) as client:
            client.flushdb()

    def make(name: str, **environment: str) -> Project:
        folder = tmp_path / name
        shutil.copytree(TUTORIALS / name, folder)
        return Project(folder, broker_url=broker, backend=redis_url, **environment)

    clean()
    yield make
    clean()


@pytest.mark.parametrize(
    "options",
    [
        "--loglevel=info",
        "--loglevel=INFO",
        "-l info --concurrency=4",
        "-l info -P eventlet",
        "-l info -P gevent",
        "-l info -P threads",
        "-l info -P solo",
    ],
)
def test_the_minimal_app(project: Callable[..., Project], options: str) -> None:
    minimal = project("minimal")

    with minimal.start(f"amqtask -A tasks worker {options}") as worker:
        assert minimal.run("python ./run_task.py").endswith("task result: 8\n")
        worker.await_log("Task tasks.add[")
        assert worker.stop() == 0


def test_run_task_asks_before_the_task_has_run(project: Callable[..., Project]) -> None:
    minimal = project("minimal")

    # No worker yet: the program waits for one that comes later.
    with minimal.start("python -u run_task.py", ready="Is Task ready: False") as caller:
        with minimal.start("amqtask -A tasks worker"):
            assert caller.wait() == 0
        assert caller.log == "Is Task ready: False\ntask result: 8\n"


def test_a_package_with_a_config_module(project: Callable[..., Project]) -> None:
    luffyapi = project("luffyapi")

    with luffyapi.start("amqtask -A mycelery.main worker --loglevel=info") as worker:
        banner = worker.log
        assert luffyapi.run("python runtask.py") == "sent\nNone\n"
        worker.await_log("send an SMS!")
        worker.await_log("SMS task 2!")
        first = luffyapi.run("python first_way.py")
        second = luffyapi.run("python second_way.py")

    for name in (
        "send_sms",
        "mycelery.sms.tasks.send_sms2",
        "mycelery.mail.tasks.send_email",
        "mycelery.cache.tasks.warm",
    ):
        assert name in banner
    assert re.fullmatch(
        rf"({UUID}) <class 'amqtask\.result\.AsyncResult'>\n(True|False)\n\1\nsent\nTrue\nmailed someone@example\.org\n",
        first,
    )
    assert second == "True\nsent\n"


def test_a_package_with_imports_and_periodic_tasks(project: Callable[..., Project]) -> None:
    wedo = project("wedo")

    with wedo.start("amqtask -A wedo worker -B --loglevel=INFO") as worker:
        worker.await_log("this is celery peroid task")
        task_id = wedo.run("amqtask -A wedo call wedo.tasks.add -a '[2, 3]'").strip()
        assert wedo.run(f"amqtask -A wedo result {task_id} --wait 60").strip() == "5"

    listed = wedo.run("amqtask -A wedo beat --list")
    assert "to_string" in listed
    assert "add on Mondays" in listed


LONG = (
    "amqtask worker --without-gossip --without-mingle --heartbeat-interval 60 -A tasks.cma.task -c 5 -E -Q cma_queue "
    "-l info -n cma.{} -Ofair"
)


@pytest.mark.parametrize("name", ["%h", "%%h"])
def test_the_long_worker_line(project: Callable[..., Project], name: str) -> None:
    cma = project("cma")
    host = socket.gethostname()
    node = f"cma.{host}@{host}" if name == "%h" else f"cma.%h@{host}"

    with cma.start(LONG.format(name)) as worker:
        divided, failed = cma.run("python add_tasks.py").split()
        worker.await_log("6 / 3 = 2, at most 500/m")
        worker.await_log("rolled back tasks.cma.task.my_task(6, 0): integer division")
        assert f"{node}: OK" in cma.run(f"amqtask -A tasks.cma.task status -d {node} -t 60")
        assert worker.stop() == 0
        log = worker.log

    assert f"{node} ready." in log
    assert "cma_queue" in log
    assert f"Task tasks.cma.task.my_task[{divided}] succeeded" in log
    assert f"Task tasks.cma.task.my_task[{failed}] raised" in log
    assert "Retry" not in log


def test_service_files_have_the_long_line(project: Callable[..., Project]) -> None:
    folder = project("cma").folder
    supervisor = configparser.ConfigParser()
    supervisor.read(folder / "supervisord.conf")
    systemd = re.search(r"^ExecStart=\S*/(amqtask .*)$", (folder / "cma.service").read_text(), re.MULTILINE)

    assert supervisor["program:cma"]["command"] == LONG.format("%h")
    assert systemd is not None
    assert systemd[1].replace("%%", "%") == LONG.format("%h")


@pytest.mark.parametrize(
    "line",
    ["amqtask -A proj worker -B -l info", "python -m proj.amqtask worker -B -l info"],
)
def test_a_package_with_a_schedule(project: Callable[..., Project], line: str) -> None:
    proj = project("proj")

    with proj.start(line) as worker:
        worker.await_log("Task proj.tasks.add[")
        worker.await_log(": 32")
        assert proj.run("python call.py") == "5\n"
        assert worker.stop() == 0


@pytest.mark.parametrize(
    "line",
    [
        "python run.py",
        "python -c \"from celery_app_task import cel; cel.worker_main(argv=['--loglevel=info'])\"",
        "python -c \"from celery_app_task import cel; cel.worker_main(argv=['worker', '--loglevel=info'])\"",
        "amqtask worker -A celery_app_task -l info",
        "amqtask worker -A celery_app_task -l info -P eventlet",
    ],
)
def test_ways_to_start_a_worker(project: Callable[..., Project], line: str) -> None:
    celerytest = project("celerytest")

    with celerytest.start(line) as worker:
        task_id = celerytest.run("python add_task.py").strip()
        eventually(lambda: celerytest.run(f"python result.py {task_id}") == "9\n")
        assert worker.stop() == 0


def test_a_result_by_its_id_in_another_process(project: Callable[..., Project], tmp_path: Path) -> None:
    celerytest = project("celerytest")
    file = tmp_path / "there"

    def publish(call: str) -> str:
        return celerytest.run(f'python -c "from celery_app_task import *; print({call})"').strip()

    def says(task_id: str, text: str) -> None:
        eventually(lambda: celerytest.run(f"python result.py {task_id}") == text, what=f"never {text!r}")

    added = publish("add.delay(4, 5)")
    assert celerytest.run(f"python result.py {added}") == "waiting to be run\n"
    divided = publish("divide.delay(1, 0)")
    retried, started = publish(f"read.delay('{file}')"), publish(f"wait_for.delay('{file}')")
    with celerytest.start("amqtask worker -A celery_app_task -l info -c 2"):
        says(added, "9\n")
        says(divided, "failed\n")
        says(retried, "to be tried again after an error\n")
        says(started, "running\n")
        file.write_text("here")
        says(retried, "here\n")
        says(started, "None\n")

    assert celerytest.run(f"python result.py {added} forget") == "9\n"
    assert celerytest.run(f"python result.py {added}") == "waiting to be run\n"


def http(method: str, url: str, value: Any = None) -> Any:
    """The JSON answer of a server on this machine."""
    body = None if value is None else json.dumps(value).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=90) as answer:
        return json.load(answer)


@pytest.mark.parametrize(
    "line",
    ["flask --app wallet amqtask worker -B -l info", "amqtask -A wallet:create_app worker -B -l info -P eventlet"],
)
def test_a_flask_app_that_keeps_in_step_with_a_chain(
    project: Callable[..., Project], tmp_path: Path, line: str
) -> None:
    node, web = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    wallet = project("wallet", CHAIN_URL=node, WALLET_DATABASE=str(tmp_path / "wallet.sqlite3"))

    def balance(address: str) -> tuple[int, int]:
        found = http("GET", f"{web}/balances/{address}")
        return found["amount"], found["height"]

    with (
        wallet.start(f"python chain.py {node.rpartition(':')[2]}", ready="node at"),
        wallet.start(line),
        wallet.start(f"flask --app wallet run -p {web.rpartition(':')[2]}", ready="Running on"),
    ):
        http("POST", f"{node}/transfers", [{"to": "alice", "amount": 5}, {"to": "bob", "amount": 1}])
        http("POST", f"{node}/transfers", [{"to": "alice", "amount": 2}])
        eventually(lambda: balance("alice") == (7, 2))
        assert balance("bob") == (1, 2)
        http("POST", f"{node}/transfers", [{"to": "bob", "amount": 10}])
        eventually(lambda: balance("bob") == (11, 3))
        task_id = http("POST", f"{web}/sync")["task"]
        assert wallet.run(f"flask --app wallet amqtask result {task_id} --wait 60").strip() == "0"
