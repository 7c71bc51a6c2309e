"""How long a result store that is away is asked again: a few seconds, or as `result_backend_always_retry` says."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from amqtask.ground.loop import exponential_backoff
from amqtask.ground.printable import bounded_logger

logger = bounded_logger("amqtask.backends")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Pauses double from `first_pause` to `longest_pause` seconds; `jitter` takes a random part of each.

    It ends after `seconds` (None: never) or `retries`, whichever is first.
    """

    seconds: float | None = 5.0
    retries: float = math.inf
    first_pause: float = 0.05
    longest_pause: float = 1.0
    jitter: bool = False


def retrying(
    work: Callable[[], T],
    policy: RetryPolicy,
    *,
    errors: tuple[type[Exception], ...],
    is_transient: Callable[[Exception], bool],
    explain: Callable[[Exception], Exception],
) -> T:
    """What `work()` returns, called again after each of `errors` that is transient.

    Raises: what `explain(error)` makes of the last one.
    """
    give_up_at = None if policy.seconds is None else time.monotonic() + policy.seconds
    retries = 0
    while True:
        try:
            return work()
        except errors as error:
            pause = exponential_backoff(
                retries, factor=policy.first_pause, maximum=policy.longest_pause, full_jitter=policy.jitter
            )
            is_late = give_up_at is not None and time.monotonic() + pause > give_up_at
            if is_late or retries >= policy.retries or not is_transient(error):
                raise explain(error) from error
            if give_up_at is None and not retries:
                logger.warning("%s; trying again until it does", explain(error))
        time.sleep(pause)
        retries += 1
