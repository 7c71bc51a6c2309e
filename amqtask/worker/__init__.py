"""The worker: consumer, strategy, dispatch, acknowledgements, shutdown."""

from __future__ import annotations

from amqtask.ground.plugins import others_names

__getattr__ = others_names(__name__)
