"""What `pip install "amqtask[…]"` knows."""

from __future__ import annotations

from importlib.metadata import metadata


def test_a_line_written_for_celery_installs() -> None:
    extras = metadata("amqtask").get_all("Provides-Extra") or []

    assert {"librabbitmq", "redis", "auth", "msgpack", "eventlet", "gevent"} <= set(extras)
