"""The table of plug-ins: what lower rows ask for by `amqtask.ground.plugins`, imported when it is asked for."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.compat.bootsteps import Steps
    from amqtask.compat.connections import Connection
    from amqtask.contrib.django.outbox import DjangoInbox, DjangoOutbox
    from amqtask.ground.shapes import CoroutineOf
    from amqtask.outbox.contract import Outbox
    from amqtask.settings import Settings
    from amqtask.worker.worker import Worker


def celery_name(module: str, name: str) -> Any:
    from amqtask import compat

    return compat.lookup(module, name)


def celery_attribute(owner: object, name: str) -> Any:
    from amqtask import compat

    return compat.attribute(owner, name)


def celery_connection(app: AmqTask) -> Connection:
    from amqtask.compat.connections import Connection

    return Connection(app)


def celery_bootsteps(app: AmqTask, worker: Worker, options: object) -> Steps:
    from amqtask.compat.bootsteps import service

    return service(app, worker, options)


def celery_loader(app: AmqTask, loader: object) -> None:
    from amqtask.compat import loaders

    loaders.use(app, loader)


def celery_tracer(task: object) -> Any:
    trace = sys.modules.get("amqtask.compat.app.trace")  # a library that replaces something there has imported it
    return None if trace is None else trace.replaced_tracer(task)


def default_app() -> AmqTask:
    from amqtask.app import AmqTask

    return AmqTask("default", set_as_current=False, loader="default")


def run_command_line(app: AmqTask | None, argv: Sequence[str]) -> int:
    from amqtask.cli.main import run

    return run(argv, app)


def load_app(name: str, source: str) -> AmqTask:
    from amqtask.cli import find_app

    return find_app.load_app(name, source)


def pool(name: str) -> type | None:
    if not {",", ":", "="}.isdisjoint(name):
        from amqtask_pools.several import several_pools

        return several_pools(name)
    match name:
        case "solo":
            from amqtask_pools.solo import SoloPool

            return SoloPool
        case "prefork" | "processes":
            from amqtask_pools.prefork import PreforkPool

            return PreforkPool
        case "threads":
            from amqtask_pools.threads import ThreadsPool

            return ThreadsPool
        case "eventlet":
            from amqtask_pools.eventlet import EventletPool

            return EventletPool
        case "gevent":
            from amqtask_pools.gevent import GeventPool

            return GeventPool
        case "asyncio":
            from amqtask_pools.asyncio import AsyncioPool

            return AsyncioPool
    return None


def load_django() -> None:
    from amqtask.contrib.django.project import load_applications

    load_applications()


def django_time_zone() -> str:
    from amqtask.contrib.django.project import time_zone

    return time_zone()


def django_backend(scheme: str) -> type | None:
    match scheme:
        case "django-db":
            from amqtask.contrib.django.backend import DatabaseBackend

            return DatabaseBackend
        case "django-cache":
            from amqtask.contrib.django.cache import CacheBackend

            return CacheBackend
    return None


def django_outbox(database: str) -> DjangoOutbox:
    from amqtask.contrib.django.outbox import DjangoOutbox

    return DjangoOutbox(database)


def django_inbox(database: str) -> DjangoInbox:
    from amqtask.contrib.django.outbox import DjangoInbox

    return DjangoInbox(database)


def after_commit(call: Callable[[], object], outbox: Outbox | None) -> None:
    from amqtask.contrib.django import around

    around.after_commit(call, outbox)


def aafter_commit(call: Callable[[], object], outbox: Outbox | None) -> Awaitable[None]:
    from amqtask.contrib.django import around

    return around.aafter_commit(call, outbox)


def follow_django_settings(conf: Settings, namespace: str | None) -> None:
    from amqtask.contrib.django.project import follow

    follow(conf, namespace)


def around_django_tasks() -> Callable[[CoroutineOf[object]], CoroutineOf[object]]:
    from amqtask.contrib.django.around import AroundTasks

    return AroundTasks().coroutine
