"""Puts the relay of an application's outbox together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from amqtask.exceptions import ConfigurationError
from amqtask.pool import GREEN_POOLS, Pool

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.outbox.contract import Outbox
    from amqtask.outbox.relay import Relay
    from amqtask.protocol.message import Message
    from amqtask.worker.options import Service


def build_relay(app: AmqTask, *, batch: int | None = None, interval: float | None = None) -> Relay:
    """A relay of the application's outbox, ready to `run()`. Raises: ConfigurationError."""
    app.load_tasks()
    conf = app.conf
    from amqtask.outbox.relay import BATCH, Relay

    return Relay(
        _outbox(app).store(),
        app.publisher,
        app.delays,
        batch=batch or BATCH,
        interval=conf.outbox_interval if interval is None else interval,
        timeout=conf.broker_publish_timeout,
        on_sent=(lambda messages: _tell_sent(app, messages)) if app.runtime.tells_sent else None,
    )


def build_relaying(app: AmqTask) -> Service:
    """A relay in a thread, for a process that does something else. Raises: ConfigurationError."""
    from amqtask.outbox.relay import Relaying

    return Relaying(build_relay(app))


def check_relay(app: AmqTask, pool_class: type[Pool]) -> None:
    """Raises: ConfigurationError where this worker cannot relay the outbox."""
    if pool_class.name in GREEN_POOLS:
        raise ConfigurationError(
            f"a worker with the {pool_class.name} pool cannot relay the outbox: the database would block all its green threads. "
            "Run `amqtask relay` beside it."
        )
    _outbox(app)


def _tell_sent(app: AmqTask, messages: Sequence[Message]) -> None:
    """What a chord is told is no call."""
    app.sent_events.sent([message for message in messages if "task" in message.properties.headers])


def _outbox(app: AmqTask) -> Outbox:
    if app.outbox is None:
        raise ConfigurationError(
            "the application has no outbox to relay: set `outbox` (True for Django's), or make a SqlAlchemyOutbox in a module "
            "that the application's `include` or `imports` names"
        )
    return app.outbox
