"""Chance that a seed decides: which message, which places of it, which values. The values are hypothesis's."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from integration.fuzz.values import field_values, json_values

T = TypeVar("T")
# Hypothesis takes milliseconds for an example: each is used several times, beside others each time.
EXAMPLES = 600


class Chance(random.Random):
    """One message's."""

    def __init__(self, seed_number: int, message_number: int) -> None:
        super().__init__(f"{seed_number}/{message_number}")
        self._seed = seed_number

    def one_in(self, count: int) -> bool:
        """True once in so many times."""
        return self.randrange(count) == 0

    def some(self, found: Sequence[T], most: int) -> list[T]:
        """Up to `most` of them, each once."""
        return self.sample(found, self.randint(0, most))

    def field(self) -> Any:
        """A value for a header."""
        return self.choice(_examples("field", self._seed))

    def json(self) -> Any:
        """A value for a body."""
        return self.choice(_examples("json", self._seed))


@lru_cache(maxsize=2)
def _examples(kind: str, seed_number: int) -> list[Any]:
    strategy: st.SearchStrategy[Any] = field_values() if kind == "field" else json_values()
    found: list[Any] = []

    @seed(seed_number)
    @settings(
        max_examples=EXAMPLES,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(value: Any) -> None:
        found.append(value)

    collect()
    return found
