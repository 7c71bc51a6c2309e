"""A worker inside a test's process, on the broker `memory://`, or on another one that a test asks for."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from amqtask import signals
from amqtask.app import AmqTask
from amqtask.assembly import build_worker
from amqtask.exceptions import ConfigurationError
from amqtask.pool import GREEN_POOLS
from amqtask.protocol.option_types import TEXTS
from amqtask.worker.options import WorkerOptions
from amqtask.worker.worker import Worker

if TYPE_CHECKING:
    from amqtask.ground.shapes import OptionDict, SettingValues

# Children keep their results to themselves on cache+memory://, and green pools patch a whole process.
_NEED_A_PROCESS = GREEN_POOLS | {"prefork"}


def _check(app: AmqTask, pool: str, *, any_broker: bool) -> None:
    """Raises: ConfigurationError for a broker that may be anybody's, or a pool that needs processes."""
    if app.broker.is_shared and not any_broker:
        raise ConfigurationError(
            "start_worker() is for tests on the in-memory broker: set broker_url = 'memory://', or say any_broker=True if the "
            f"messages in {app.broker_name} may be taken"
        )
    if pool in _NEED_A_PROCESS:
        raise ConfigurationError(f"the {pool} pool needs processes of its own: test with solo, threads or asyncio")


# Parameters of celery.contrib.testing.worker.start_worker, and what they are here; None: there is nothing to say.
_CELERYS = {
    "shutdown_timeout": "timeout", "perform_ping_check": None, "ping_task_timeout": None, "loglevel": None, "logfile": None,
}  # fmt: skip
_LISTS = frozenset({"queues", "exclude_queues", "include"})
# Names of options that a worker has.
OPTIONS = frozenset(WorkerOptions._fields)


def options_of_celery(parameters: SettingValues) -> OptionDict:
    """The options of `start_worker` that parameters of Celery's stand for. Raises: ConfigurationError for one that is none."""
    unknown = sorted(parameters.keys() - _CELERYS.keys() - OPTIONS)
    if unknown:
        known = ", ".join(sorted(_CELERYS.keys() | OPTIONS))
        raise ConfigurationError(f"a worker in a test has no option {', '.join(unknown)}, only {known}")
    told = {"without_mingle": True, "without_heartbeat": True, **parameters}  # as in Celery
    return {
        _CELERYS.get(name) or name: tuple(TEXTS.convert(value)) if name in _LISTS else value
        for name, value in told.items()
        if _CELERYS.get(name, name) is not None and value is not None
    }


@contextmanager
def start_worker(
    app: AmqTask,
    *,
    pool: str = "solo",
    concurrency: int = 1,
    queues: Sequence[str] = (),
    hostname: str | None = None,
    timeout: float = 30.0,
    any_broker: bool = False,
    **options: Any,
) -> Iterator[Worker]:
    """A worker of `app` in a thread of this process; at the block's end it finishes what runs and ends.

        app.conf.update(broker_url="memory://", result_backend="cache+memory://")
        with start_worker(app):
            assert add.delay(2, 2).get(timeout=5) == 4

    `timeout` is seconds to become ready, and again to end; `pool` is solo, threads, asyncio or a plug-in; `hostname` its node
    name, which several workers at once need (default: celery@ and this host); `any_broker` takes tasks from RabbitMQ or Redis,
    too; `options` are others of a worker: exclude_queues, task_events, prefetch_multiplier …
    Raises: ConfigurationError for another pool or broker; what ended the worker, from the end of the block; TimeoutError.
    """
    _check(app, pool, any_broker=any_broker)
    options |= {"pool": pool, "concurrency": concurrency, "queues": tuple(queues), "hostname": hostname}
    worker = build_worker(app, WorkerOptions(install_signals=False, banner=False, **options))
    with _running(worker, timeout):
        yield worker


@contextmanager
def _running(worker: Worker, timeout: float) -> Iterator[None]:
    """The worker runs in a thread, from when it is ready until the block's end."""
    ready_or_over = threading.Event()
    failures: list[BaseException] = []

    def on_ready(sender: object, **_: object) -> None:
        if sender is worker:
            ready_or_over.set()

    def run() -> None:
        try:
            worker.run()
        except BaseException as error:  # noqa: BLE001 - raised in the test's thread
            failures.append(error)
        finally:
            ready_or_over.set()

    signals.worker_ready.connect(on_ready)
    thread = threading.Thread(target=run, name="amqtask-test-worker")
    thread.start()
    try:
        if not ready_or_over.wait(timeout):
            raise TimeoutError(f"the worker was not ready after {timeout:g} s")
        if failures:
            raise failures[0]
        yield
    finally:
        signals.worker_ready.disconnect(on_ready)
        worker.stop()
        thread.join(timeout)
    if failures:
        raise failures[0]
    if thread.is_alive():
        raise TimeoutError(f"the worker did not end within {timeout:g} s: does a task still run?")
