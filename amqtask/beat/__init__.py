"""beat: publishes periodic tasks when they are due; any number may run, one of them at a time does.

`service` is the page to begin with; `scheduler` says what is due, `leader` who may publish, `sender` makes the message.
Entries come from a store (`contract`, `settings_store`, or Django's); `build` puts a beat together and runs it.
"""

from amqtask.beat.sender import BeatLazyFunc
from amqtask.ground.plugins import others_names

__all__ = ["BeatLazyFunc"]

__getattr__ = others_names(__name__)
