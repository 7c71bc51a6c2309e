"""The one exponential backoff, with or without jitter."""

from __future__ import annotations

import random


def exponential_backoff(
    retries: int, *, factor: float = 1.0, maximum: float = 600.0, full_jitter: bool = False
) -> float:
    """`factor` × 2^retries seconds, at most `maximum`; with `full_jitter` a random part of that, as Celery does it."""
    seconds = min(maximum, factor * 2 ** min(retries, 64))
    return random.uniform(0, seconds) if full_jitter else seconds
