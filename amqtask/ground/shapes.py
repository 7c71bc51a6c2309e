"""Names of the shapes that recur; only type checkers read them.

A name without `Dict` is for reading (a tuple or a mapping), one with it is a dictionary that its holder may change. `Any` stands
where the values are the user's own (arguments), or have types that a reader knows by their key only (headers, JSON).
"""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

T = TypeVar("T")

# What an `async def` gives when it is called.
CoroutineOf = Coroutine[Any, Any, T]

# What a caller gives a task by position and by name: anything that the serializer can write.
Arguments = tuple[Any, ...]
Keywords = Mapping[str, Any]
KeywordDict = dict[str, Any]

# The decoded body of a task message: positional and keyword arguments, and what is to follow (callbacks, chain, chord …).
TaskBody = tuple[Any, Any, dict[str, Any]]

# Options by name: of a call or a task (countdown, queue, priority …), whose types amqtask.options has, or of a connection.
Options = Mapping[str, Any]
OptionDict = dict[str, Any]

# An AMQP field table: None, truths, numbers, texts, bytes, times, and lists and tables of these.
FieldTable = dict[str, Any]
# Headers of a message: a field table, if AMQP carries it.
Headers = Mapping[str, Any]
HeaderDict = dict[str, Any]
# Arguments of a queue, an exchange or a binding: a field table, too.
QueueArguments = Mapping[str, Any]
QueueArgumentDict = dict[str, Any]

# A signature or composition as a message has it: "task", "args", "kwargs", "options" …
SignatureFields = Mapping[str, Any]
# Headers that a call hands down to what follows it, by name.
Stamps = Mapping[str, Any]
StampDict = dict[str, Any]

# Arguments of a remote command, by name.
CommandArguments = Mapping[str, Any]
# An event of a worker or a task, by field.
EventFields = Mapping[str, Any]
EventDict = dict[str, Any]
# The answers to a remote command, by worker.
Replies = dict[str, Any]

# Settings by name, as a user writes them.
SettingValues = Mapping[str, Any]
SettingDict = dict[str, Any]

# What JSON writes as an object: entries of a listing, a result's stored fields, numbers of a worker.
JsonObject = dict[str, Any]
JsonFields = Mapping[str, Any]
