"""Masks secrets in logs, reports and errors: passwords in URLs, and values whose names say that they are secret."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

STARS = "********"
_SECRET = re.compile(
    r"passw|pwd|(^|[_\W])pass($|[_\W])|secret|token|credential|private|(^|[_\W])auth|(^|[_\W])login(?!_method)|security_key|api_?key|access_key",
    re.IGNORECASE,
)
# A URL begins here; what follows belongs to it.
_URLS = re.compile(r"(?=(?<![\w+.-])[\w+.-]+://)")
# From the first colon of the login to the last @: a password that should have been escaped may hold anything in between.
_PASSWORD = re.compile(r"(?P<login>^[\w+.-]+://[^\s:/@]*:).*@", re.DOTALL)
_QUERY = re.compile(r"(?P<name>[?&;](?P<word>[^=&;#\s]+)=)[^&;#\s'\"]*")


def is_secret(name: str) -> bool:
    """Whether a value of that name is secret."""
    return _SECRET.search(name) is not None


def mask_urls(text: str, stars: str = STARS) -> str:
    """The text with stars for the passwords of the URLs in it."""
    if "://" not in text:
        return text
    return "".join(
        _QUERY.sub(_starred(stars), _PASSWORD.sub(rf"\g<login>{stars}@", part)) for part in _URLS.split(text)
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
