"""`amqtask_real_worker`: a worker process on a real broker, started by a user's own pytest."""

from __future__ import annotations

import pytest

from integration.conftest import Broker

pytest_plugins = ["pytester"]

PROJECT = """
import os
from amqtask import AmqTask, chain

app = AmqTask("proj", backend="rpc://", broker_publish_timeout=60, broker_connection_timeout=60)

@app.task
def add(x, y):
    return x + y

@app.task
def where():
    return os.getpid()

@app.task(bind=True)
def timezone(self):
    return self.app.conf.timezone
"""
TESTS = """
import os
import signal
import proj, pytest
from amqtask import chain

QUEUES = []

def test_tasks_run_in_another_process(amqtask_real_worker):
    QUEUES.extend(amqtask_real_worker.queues)
    assert proj.add.delay(2, 2).get(timeout=90) == 4
    assert proj.where.delay().get(timeout=90) not in (os.getpid(), amqtask_real_worker.pid)
    assert chain(proj.add.s(1, 1), proj.add.s(1)).delay().get(timeout=90) == 3
    assert "proj.add" in amqtask_real_worker.log

@pytest.mark.amqtask(timezone="Asia/Shanghai")
def test_settings_reach_it(amqtask_real_worker):
    assert proj.timezone.delay().get(timeout=90) == "Asia/Shanghai"
    assert amqtask_real_worker.stop() == 0

def test_it_may_be_killed(amqtask_real_worker):
    assert amqtask_real_worker.queues != tuple(QUEUES)
    amqtask_real_worker.kill()

def test_say_which_queue():
    print("\\nqueue:", *QUEUES)
"""


def test_a_worker_process_for_users_tests(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, broker_url: str, rabbit: Broker
) -> None:
    pytester.makepyfile(proj=PROJECT, test_proj=TESTS)
    pytester.makeini("[pytest]\namqtask_app = proj")
    monkeypatch.setenv("AMQTASK_BROKER_URL", broker_url)

    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-W", "error", "-s")

    result.assert_outcomes(passed=4)
    (queue,) = [line.split()[1] for line in result.outlines if line.startswith("queue:")]
    assert not rabbit.exists(queue)
    assert not rabbit.exists(f"{queue}.dead")


def test_a_worker_that_does_not_start_shows_its_log(pytester: pytest.Pytester, broker_url: str) -> None:
    pytester.makepyfile(
        proj="import sys\nfrom amqtask import AmqTask\napp = AmqTask(backend='rpc://')\nif 'pytest' not in sys.modules: 1 / 0",
        test_proj="def test_it(amqtask_real_worker): ...",
    )
    pytester.makeini("[pytest]\namqtask_app = proj")

    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*RuntimeError: the worker ended with exit code 1:*", "*ZeroDivisionError*"])


FOR_CELERY = """
import pytest
from amqtask.contrib.testing.worker import start_worker

pytest_plugins = ("amqtask.contrib.pytest",)

@pytest.fixture(scope="session")
def celery_config():
    return {"broker_url": BROKER, "result_backend": BACKEND, "task_default_queue": QUEUE}

def test_the_worker_of_a_test_uses_the_broker_that_the_configuration_names(celery_app, celery_worker):
    @celery_app.task
    def mul(x, y):
        return x * y

    assert mul.delay(4, 4).get(timeout=90) == 16

def test_so_does_one_that_is_started_by_hand(celery_app):
    @celery_app.task
    def add(x, y):
        return x + y

    with start_worker(celery_app, perform_ping_check=False):
        assert (add.s(4, 4) | add.s(1)).delay().get(timeout=90) == 9
"""


@pytest.mark.parametrize("broker", ["rabbitmq", "redis"])
def test_fixtures_of_celery_s_take_another_broker(
    pytester: pytest.Pytester, broker: str, broker_url: str, redis_url: str, rabbit: Broker
) -> None:
    url = broker_url if broker == "rabbitmq" else redis_url
    text = FOR_CELERY.replace("BROKER", repr(url)).replace("BACKEND", repr(redis_url))
    text = text.replace("QUEUE", repr(rabbit.queue("celerys")))
    pytester.makepyfile(test_tasks=text)

    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")

    result.assert_outcomes(passed=2)
