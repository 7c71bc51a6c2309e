"""RESP, the protocol of Redis, without I/O: commands as bytes, and replies out of bytes (https://redis.io/docs/reference/protocol-spec)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

Argument = bytes | str | int | float


class ReplyError(Exception):
    """An error that Redis answered; its first word is the code: OOM, READONLY, NOAUTH …"""

    @property
    def code(self) -> str:
        """The code."""
        return str(self).partition(" ")[0]


class Push(NamedTuple):
    """What Redis says unasked: a published message, a key that has changed."""

    fields: list[Any]


def ignore_reply(reply: object) -> None:
    """For a command whose reply says nothing."""


class _Incomplete(Exception):
    """The rest has not come yet."""


def command(*arguments: Argument) -> bytes:
    """A command as an array of strings."""
    pieces = [b"*%d\r\n" % len(arguments)]
    for argument in arguments:
        encoded = argument if isinstance(argument, bytes) else str(argument).encode()
        pieces += (b"$%d\r\n" % len(encoded), encoded, b"\r\n")
    return b"".join(pieces)


class Parser:
    """Takes bytes as they come, and gives replies as they are complete. Strings are bytes, maps are flat lists."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._position = 0

    def feed(self, chunk: bytes) -> Iterator[Any]:
        """The replies that are complete with this chunk. Raises: ValueError when it is not RESP."""
        self._buffer += chunk
        while True:
            start = self._position
            try:
                reply = self._read()
            except _Incomplete:
                self._position = start
                break
            yield reply
        if self._position:
            del self._buffer[: self._position]
            self._position = 0

    def _line(self) -> bytes:
        end = self._buffer.find(b"\r\n", self._position)
        if end < 0:
            raise _Incomplete
        line = bytes(self._buffer[self._position : end])
        self._position = end + 2
        return line

    def _read(self) -> Any:
        line = self._line()
        kind, rest = line[:1], line[1:]
        if kind in b"$=":
            return self._string(int(rest))
        if kind in b"*~":
            return self._array(int(rest))
        if kind == b":":
            return int(rest)
        if kind == b"+":
            return rest
        if kind == b"-":
            return ReplyError(rest.decode(errors="replace"))
        if kind == b"_":
            return None
        if kind == b"%":
            return self._array(2 * int(rest))
        if kind == b">":
            return Push(self._array(int(rest)) or [])
        if kind == b",":
            return float(rest)
        if kind == b"#":
            return rest == b"t"
        if kind == b"(":
            return int(rest)
        raise ValueError(f"not a reply of Redis: {line[:40]!r}")

    def _string(self, size: int) -> bytes | None:
        if size < 0:
            return None
        end = self._position + size
        if len(self._buffer) < end + 2:
            raise _Incomplete
        text = bytes(self._buffer[self._position : end])
        self._position = end + 2
        return text

    def _array(self, size: int) -> list[Any] | None:
        return None if size < 0 else [self._read() for _ in range(size)]
