"""Calls from where programs make them: struck by exceptions, in signal handlers, forked children, at the end of the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from amqtask.protocol.entities import Queue
from amqtask.protocol.message import Message, Properties
from amqtask.transport.publisher import PikaPublisher
from amqtask.transport.url import parse_broker_urls
from integration import interrupted
from integration.conftest import Broker
from integration.faults import Forwarder
from integration.interrupted import KINDS
from integration.nodes import free_port
from integration.workers import LoggedProcess


@pytest.fixture
def queue(rabbit: Broker) -> str:
    """A queue's name."""
    return rabbit.queue("struck")


@pytest.fixture
def link(broker_url: str) -> Iterator[Forwarder]:
    """The way to the broker, for breaking."""
    with Forwarder(broker_url) as forwarder:
        yield forwarder


def to(queue: str) -> Message:
    """A message that makes its queue."""
    return Message(b"body", Properties(), "", queue, (Queue(queue),))


@pytest.mark.parametrize("kind", KINDS)
def test_what_strikes_a_call_comes_out_of_it_and_the_next_one_works(kind: str, broker_url: str) -> None:
    count = interrupted.run(broker_url, kind, 40, seed=uuid.uuid4().int)

    assert count.is_well, str(count)
    assert count.thrown >= 40


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # see `run`
@pytest.mark.parametrize("kind", KINDS)
def test_so_it_is_on_redis(kind: str, redis_url: str) -> None:
    count = interrupted.run(redis_url, kind, 100, seed=uuid.uuid4().int)

    assert count.is_well, str(count)
    assert count.thrown >= 100


def test_a_signal_handler_publishes_while_the_only_connection_waits_for_a_confirm(
    rabbit: Broker, queue: str, link: Forwarder
) -> None:
    publisher = PikaPublisher(parse_broker_urls(link.url), timeout=60.0, pool_limit=1)
    publisher.publish(to(queue))
    link.hold_after(b"the-marker")
    published: list[int] = []

    def handler(*_: object) -> None:
        publisher.publish(to(queue))
        published.append(1)
        link.heal()

    before = signal.signal(signal.SIGUSR1, handler)
    main = threading.get_ident()

    def interrupt() -> None:
        if link.sprung.wait(90):
            signal.pthread_kill(main, signal.SIGUSR1)

    helper = threading.Thread(target=interrupt, daemon=True)
    try:
        helper.start()
        publisher.publish(Message(b"the-marker", Properties(), "", queue, ()))
    finally:
        signal.signal(signal.SIGUSR1, before)
        helper.join(90)
        publisher.close()

    assert published == [1]
    assert rabbit.count(queue) == 3
    assert link.accepted == 2  # one more than the limit, for as long as it was needed


def test_children_forked_at_any_moment_publish_while_the_parents_threads_go_on(
    rabbit: Broker, broker_url: str, queue: str
) -> None:
    publisher = PikaPublisher(parse_broker_urls(broker_url), timeout=60.0)
    is_over = threading.Event()
    failures: list[BaseException] = []

    def publish() -> None:
        while not is_over.is_set():
            try:
                publisher.publish(to(queue))
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=publish) for _ in range(3)]
    for thread in threads:
        thread.start()
    codes = []
    for _ in range(10):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                signal.alarm(90)
                publisher.publish(to(queue))
                code = 0
            finally:
                os._exit(code)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    is_over.set()
    for thread in threads:
        thread.join(90)
    publisher.close()

    assert codes == [0] * 10
    assert failures == []


GREEN = """
    import random, sys
    if sys.argv[1] == "gevent":
        from gevent import monkey, spawn, joinall, Timeout
        monkey.patch_all()
        starting = lambda seconds, error: Timeout(seconds, error)
    else:
        import eventlet
        eventlet.monkey_patch()
        from eventlet import spawn, Timeout
        starting = lambda seconds, error: Timeout(seconds, error)
        def joinall(all, raise_error): [each.wait() for each in all]
    from amqtask import AmqTask

    class ThreadInterrupt(Exception):
        pass

    app = AmqTask("green", broker=sys.argv[2], backend="rpc://", broker_pool_limit=3, broker_publish_timeout=60.0)
    app.conf.update(task_default_queue=sys.argv[3], task_default_queue_type="classic", task_dead_letter=False)
    app.send_task("t")
    struck = [0]

    def publish(number):
        for _ in range(20):
            timeout = starting(random.uniform(0.0001, 0.02), ThreadInterrupt())
            if hasattr(timeout, "start") and not timeout.pending:
                timeout.start()
            try:
                app.send_task("t")
            except ThreadInterrupt:
                struck[0] += 1
            finally:
                timeout.cancel()

    joinall([spawn(publish, number) for number in range(8)], raise_error=True)
    for _ in range(5):
        app.send_task("t")
    app.close()
    print("struck" if struck[0] else "missed")
"""


@pytest.mark.parametrize("library", ["gevent", "eventlet"])
def test_green_threads_whose_time_is_up_leave_the_connections_to_the_others(
    library: str, broker_url: str, rabbit: Broker, queue: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(GREEN), library, broker_url, queue],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )

    assert (done.returncode, done.stdout.strip()) == (0, "struck"), done.stderr


PROGRAM = """
    import atexit
    from amqtask.protocol.entities import Queue
    from amqtask.protocol.message import Message, Properties
    from amqtask.transport.publisher import PikaPublisher
    from amqtask.transport.url import parse_broker_urls

    queue = {queue!r}
    publisher = PikaPublisher(parse_broker_urls({url!r}), timeout=60)

    class Last:
        def __del__(self):
            publisher.publish(Message(b"", Properties(), "", queue, (Queue(queue),)))

    @atexit.register
    def goodbye():
        publisher.publish(Message(b"", Properties(), "", queue, (Queue(queue),)))

    Last()
    publisher.publish(Message(b"", Properties(), "", queue, (Queue(queue),)))
    kept = Last()
    del kept
"""


def test_finalizers_and_the_ends_of_programs_publish(rabbit: Broker, broker_url: str, queue: str) -> None:
    program = PROGRAM.format(queue=queue, url=broker_url)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120, check=False
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert rabbit.count(queue) == 4


def test_a_broker_that_is_away_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    publisher = PikaPublisher(parse_broker_urls(f"amqp://127.0.0.1:{free_port()}/"), timeout=1.0)

    with caplog.at_level("INFO"), pytest.raises(Exception, match="no broker answers"):
        publisher.publish(to("any"))

    assert caplog.records == []


HANGING = """
    import socket, sys, time
    from amqtask import AmqTask
    from amqtask.exceptions import PublishError

    def hang(*_, **__):
        time.sleep(3600)

    socket.getaddrinfo = hang
    app = AmqTask("hanging", broker="amqp://somewhere.invalid/", broker_publish_timeout=1.0)
    try:
        app.send_task("t")
    except PublishError as error:
        print(error)
"""


def test_a_resolver_that_hangs_keeps_neither_a_call_nor_the_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(HANGING)], capture_output=True, text=True, timeout=90, check=False
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert "did not answer in time" in done.stdout


HANGING_WORKER = """
    import socket, time
    from amqtask import AmqTask

    def hang(*_, **__):
        time.sleep(3600)

    socket.getaddrinfo = hang
    app = AmqTask("hanging", broker="amqp://somewhere.invalid/", broker_connection_timeout=1.0)
    app.worker_main(["worker", "-P", "threads", "-c", "1"])
"""


def test_a_resolver_that_hangs_keeps_no_worker_from_ending(tmp_path: Path) -> None:
    program = tmp_path / "hanging.py"
    program.write_text(textwrap.dedent(HANGING_WORKER))
    environment = {name: "" for name in os.environ if name.endswith("_BROKER_URL")}

    with LoggedProcess([sys.executable, str(program)], ready="no broker answers", environment=environment) as worker:
        assert worker.stop() == 0
        assert "pika" not in worker.log
