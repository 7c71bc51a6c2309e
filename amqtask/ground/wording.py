"""Wording of errors and reports: articles, plurals, messages of other libraries."""

from __future__ import annotations


def described(value: object) -> str:
    """A value's type with its article: `a list`, `an int`."""
    return with_article(type(value).__name__)


def with_article(noun: str) -> str:
    """`a list`, `an object`."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def count(number: int, noun: str) -> str:
    """`1 message`, `2 messages`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def clause(error: object) -> str:
    """The message of an error, as part of a sentence: without the full stop that some libraries end it with."""
    return str(error).rstrip(" .")
