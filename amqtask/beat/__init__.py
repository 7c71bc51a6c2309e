"""beat: publishes periodic tasks when they are due; any number may run, one of them at a time does."""

from amqtask.beat.sender import BeatLazyFunc
from amqtask.ground.plugins import others_names

__all__ = ["BeatLazyFunc"]

__getattr__ = others_names(__name__)
