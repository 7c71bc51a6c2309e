"""Text for people: in one line, bounded, without control characters; secrets under stars."""

from __future__ import annotations

import logging
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Any

# Characters of one text.
LONGEST = 1000
# Characters of a traceback in a log; what is more is left out in its middle.
_HEAD, _TAIL = 1500, 3500
_LONGEST_LINE = 500
_ENOUGH = 50_000
# Characters of one argument of a log line.
_LONGEST_ARGUMENT = 600
_PLAIN = (int, float, bool, type(None))


def printable(text: str, limit: int = LONGEST) -> str:
    """The text with escapes for what moves a cursor or ends a line; at most `limit` characters of it, and how many there are."""
    if text.isprintable() and len(text) <= limit:
        return text
    shown = text[:limit]
    if not shown.isprintable():
        shown = "".join(map(_escaped, shown))[:limit]
    return f"{shown}… ({len(text)} characters)" if len(text) > limit else shown


def printable_lines(text: str) -> str:
    """`printable` for text of several lines: line ends stay, and no bound."""
    return "\n".join(printable(line, 10 * len(line)) for line in text.expandtabs().split("\n"))


def _escaped(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


class Lines(str):
    """Text of several lines that stays so in a log: a traceback. Its lines are indented, so none looks like another record."""

    __slots__ = ()


def _indented(text: str) -> str:
    # Most of a text without an end is not looked at.
    halves = [text] if len(text) <= 2 * _ENOUGH else [text[:_ENOUGH], text[-_ENOUGH:]]
    shown = "\n".join(f"    {printable(line, _LONGEST_LINE)}" for half in halves for line in half.split("\n") if line)
    if len(halves) == 1 and len(shown) <= _HEAD + _TAIL:
        return shown
    return f"{shown[:_HEAD]}\n    … (the middle of {len(text)} characters is left out)\n    {shown[-_TAIL:]}"


class _Shown:
    """An argument of a log line, made printable when it is formatted."""

    __slots__ = ("_value",)

    def __init__(self, value: object) -> None:
        self._value = value

    def __str__(self) -> str:
        return self._written(str)

    def __repr__(self) -> str:
        return self._written(repr)

    def _written(self, write: Callable[[Any], str]) -> str:
        try:
            return printable(write(self._value), _LONGEST_ARGUMENT)
        except Exception as error:  # noqa: BLE001 - a user's __str__; what it raised is in the text
            return f"<{type(self._value).__name__}: {write.__name__}() raised {type(error).__name__}>"


def _argument(value: Any) -> object:
    value_class = value.__class__
    if value_class is str:
        return value if value.isprintable() and len(value) <= _LONGEST_ARGUMENT else _Shown(value)
    if value_class in _PLAIN:
        return value
    return Lines(_indented(value)) if value_class is Lines else _Shown(value)


class _Guard(logging.Filter):
    """A log filter: texts that others wrote (names, ids, errors) cannot forge a log line, nor make one endless."""

    def filter(self, record: logging.LogRecord) -> bool:
        arguments = record.args
        if isinstance(arguments, tuple):
            record.args = tuple(map(_argument, arguments))
        elif arguments:
            record.args = (_Shown(arguments),)
        if not arguments:
            record.msg = printable(str(record.msg))
        if record.exc_info and record.exc_info[0] is not None and not record.exc_text:
            record.exc_text = _indented("".join(traceback.format_exception(*record.exc_info)))
        return True


_GUARD = _Guard()


def bounded_logger(name: str) -> logging.Logger:
    """A logger of ours: its arguments are made printable and bounded, whoever's handlers write them; it does not raise."""
    logger = unbroken_logger(name)
    logger.addFilter(_GUARD)
    return logger


def unbroken_logger(name: str) -> logging.Logger:
    """A logger whose lines end neither worker nor task when a user's handler raises: the program's stderr says what it raised."""
    logger = logging.getLogger(name)
    logger.callHandlers = partial(_call_handlers, logger)  # type: ignore[method-assign]
    return logger


def _call_handlers(logger: logging.Logger, record: logging.LogRecord) -> None:
    try:
        # The class's at this moment: libraries that collect log lines replace it.
        type(logger).callHandlers(logger, record)
    except Exception:  # noqa: BLE001 - whatever the handler raised
        if logging.raiseExceptions and sys.__stderr__ is not None:
            traceback.print_exc(file=sys.__stderr__)


def described(value: object) -> str:
    """A value's type with its article: `a list`, `an int`."""
    return with_article(type(value).__name__)


def with_article(noun: str) -> str:
    """`a list`, `an object`."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def count(number: int, noun: str) -> str:
    """`1 message`, `2 messages`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def first_of(names: Sequence[str]) -> str:
    """The first three of some names, and a sign that there are more."""
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")


def clause(error: object) -> str:
    """The message of an error, as part of a sentence: without the full stop that some libraries end it with."""
    return str(error).rstrip(" .")


# -- Masks secrets in logs, reports and errors: passwords in URLs, and values whose names say that they are secret.

STARS = "********"
# Compiled by what needs them first: most processes show nothing that has secrets.
_SECRET = (
    r"(?i)passw|pwd|(^|[_\W])pass($|[_\W])|secret|token|credential|private|(^|[_\W])auth|(^|[_\W])login(?!_method)"
    r"|security_key|encryption_keys|alert_to|api_?key|access_key"
)
# A URL begins here; what follows belongs to it.
_URLS = r"(?=(?<![\w+.-])[\w+.-]+://)"
# From the first colon of the login to the last @: a password that should have been escaped may hold anything in between.
_PASSWORD = r"(?s)(?P<login>^[\w+.-]+://[^\s:/@]*:).*@"
_QUERY = r"(?P<name>[?&;](?P<word>[^=&;#\s]+)=)[^&;#\s'\"]*"


def is_secret(name: str) -> bool:
    """Whether a value of that name is secret."""
    return re.search(_SECRET, name) is not None


def mask_urls(text: str, stars: str = STARS) -> str:
    """The text with stars for the passwords of the URLs in it."""
    if "://" not in text:
        return text
    return "".join(
        re.sub(_QUERY, _starred(stars), re.sub(_PASSWORD, rf"\g<login>{stars}@", part))
        for part in re.split(_URLS, text)
    )


def _starred(stars: str) -> Any:
    return lambda match: f"{match['name']}{stars}" if is_secret(match["word"]) else match[0]


def masked(name: str, value: object) -> object:
    """A setting's value with stars for its secrets, in tables and lists too."""
    if value is None or isinstance(value, bool):
        return value
    if is_secret(name):
        return STARS
    if isinstance(value, str):
        return mask_urls(value)
    if isinstance(value, bytes):
        return mask_urls(repr(value))
    if isinstance(value, Mapping):
        return {key: masked(str(key), item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        if len(value) == 2 and isinstance(value[0], str) and is_secret(value[0]):
            return [value[0], STARS]
        return [masked("", item) for item in value]
    return value


def masked_plain(name: str, value: object) -> object:
    """`masked` in a form that JSON can carry."""
    hidden = masked(name, value)
    if hidden is None or isinstance(hidden, (bool, int, float, str)):
        return hidden
    if isinstance(hidden, Mapping):
        return {str(key): masked_plain(str(key), item) for key, item in hidden.items()}
    if isinstance(hidden, (list, tuple, set, frozenset)):
        return [masked_plain("", item) for item in hidden]
    return mask_urls(repr(hidden))


def duration(seconds: float | None) -> str | None:
    """Seconds as a person reads them: `4 ms`, `2.5 s`, `3 min 20 s`, `5 h 2 min`, `3 d 4 h`."""
    if seconds is None:
        return None
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    for unit, size, part, part_size in (("min", 60, "s", 1), ("h", 3600, "min", 60), ("d", 86_400, "h", 3600)):
        if seconds < size * (24 if unit == "h" else 60) or unit == "d":
            remainder = int(seconds % size // part_size)
            return (
                f"{int(seconds // size)} {unit} {remainder} {part}" if remainder else f"{int(seconds // size)} {unit}"
            )
    raise AssertionError


def local_time(moment: datetime | None) -> str | None:
    """A time as a person reads it here, to the second."""
    return None if moment is None else f"{moment.astimezone():%Y-%m-%d %H:%M:%S}"


# -- Times as a person writes them.


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def moment(written: str) -> datetime:
    """A time in ISO 8601 (local without a zone), or so long ago: 30s, 10m, 2h, 7d. Raises: ValueError."""
    text = written.strip()
    number, unit = text[:-1], _UNITS.get(text[-1:])
    try:
        if unit is not None and number.replace(".", "", 1).isdecimal():
            return datetime.now().astimezone() - timedelta(seconds=float(number) * unit)
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError):
        raise ValueError(f"{text[:100]!r} is no time: 2026-11-30T08:15, or so long ago: 30s, 10m, 2h, 7d") from None
