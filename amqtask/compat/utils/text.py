"""`celery.utils.text`."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

__all__ = ["abbr", "abbrtask", "dedent", "indent", "join", "pluralize", "str_to_list", "truncate"]

dedent = textwrap.dedent


def abbr(S: str, max: int, ellipsis: str | bool = "...") -> str:
    """The text, cut to a length."""
    if len(S) <= max:
        return S
    mark = "..." if ellipsis is True else ellipsis or ""
    return S[: max - len(mark)] + mark


def abbrtask(S: str, max: int) -> str:
    """A task's name, its module cut."""
    if len(S) <= max:
        return S
    module, _, name = S.rpartition(".")
    return f"{abbr(module, max - len(name), False)}[.]{name}"


def truncate(s: str, maxlen: int = 128, suffix: str = "...") -> str:
    """The text, cut to a length."""
    return s if not maxlen or len(s) < maxlen else s[:maxlen].rsplit(" ", 1)[0] + suffix


def indent(t: str, indent: int = 0, sep: str = "\n") -> str:
    """Each line further in."""
    return sep.join(" " * indent + line for line in t.split(sep))


def join(l: Iterable[str], sep: str = "\n") -> str:  # noqa: E741 - Celery's name
    """Those that are not empty."""
    return sep.join(part for part in l if part)


def pluralize(n: float, text: str, suffix: str = "s") -> str:
    """`2 tasks` needs its s."""
    return text if n == 1 else text + suffix


def str_to_list(s: str | list[str]) -> list[str]:
    """`a,b` as a list."""
    return s.split(",") if isinstance(s, str) else s
