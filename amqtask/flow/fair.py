"""Which shard of its queue a call of a task with `fair_by` goes to."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from amqtask.flow.keys import FlowPlan, canonical_text
from amqtask.protocol.flow_options import as_fair, weighted_text

if TYPE_CHECKING:
    from amqtask.protocol.flow_options import Fair


class FairPlan:
    """The shares of one task's calls. Raises: WrongValue for arguments that the function does not have."""

    def __init__(self, name: str, function: Callable[..., Any], fair: Fair) -> None:
        self._fair = fair
        self._keys = FlowPlan(name, function, None, ())
        self._keys.check("fair_by", fair.by)

    def shard(self, args: Sequence[Any], kwargs: Mapping[str, Any], count: int) -> int:
        """The number of the call's shard, of so many; the same in each process. Raises: TypeError for arguments that the function
        does not take; what a function `by` raises."""
        values = self._keys.values(self._fair.by, args, kwargs)
        key = values[0] if isinstance(values, list) and len(values) == 1 else values
        text = canonical_text(key)
        # A key of weight 3 has three shards, so three turns in each round.
        weight = self._fair.weights.get(weighted_text(key), 1) if self._fair.weights else 1
        if weight > 1 and (turn := random.randrange(weight)):
            return (zlib.crc32(text.encode()) + turn) % count
        return zlib.crc32(text.encode()) % count


def fair_plan_of(name: str, function: Callable[..., Any], fair: object) -> FairPlan | None:
    """The plan of a task; None for one that does not ask for it. Raises: WrongValue."""
    return None if fair is None else FairPlan(name, function, as_fair(fair))
