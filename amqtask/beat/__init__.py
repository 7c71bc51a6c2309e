"""beat: publishes periodic tasks when they are due; any number may run, one of them at a time does."""

from amqtask.beat.lazy import BeatLazyFunc

__all__ = ["BeatLazyFunc"]
