"""From a task's options and a call's arguments to the keys of a store; the same at the caller and in the worker."""

from __future__ import annotations

import inspect
import json
import random
import sys
import uuid
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from amqtask.exceptions import WrongValue
from amqtask.flow.contract import Bound, Guard, Lock
from amqtask.ground.plugins import did_you_mean
from amqtask.ground.printable import printable
from amqtask.protocol.flow_options import Breaker, Concurrency, Limit, Unique, as_fair, label_of, weighted_text
from amqtask.protocol.serialization import dumps

if TYPE_CHECKING:
    from amqtask.protocol.flow_options import By, Fair

PREFIX = "amqtask-flow:"
# On a message: the key of a unique call; whether its caller has taken that.
UNIQUE, TAKEN = "amqtask-unique", "amqtask-unique-taken"
# On the message of a run that was refused: its tickets, by limit.
TICKETS = "amqtask-tickets"
# What a message that runs anew does not keep: by then its key may be another call's, and its place in a line is gone.
OF_ONE_RUN = (TAKEN, TICKETS)
_LONGEST_KEY = 500
_PLAIN = (str, bool, int, float, type(None))
_MOST_RECENT = 1000
# Characters of a key's values that are kept for people.
_LONGEST_TEXT = 100


class FlowPlan:
    """What one task asks for, and the keys of its calls. Raises: WrongValue for arguments that the function does not have."""

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        unique: Unique | None,
        limits: Sequence[Limit],
        breaker: Breaker | None = None,
        *,
        tells_keys: bool = True,
    ) -> None:
        self.name = name
        self._tells_keys = tells_keys
        self.unique = unique
        self.limits = tuple(limits)
        # A cluster keeps the keys of a task together by what is in braces.
        self.scope = f"{PREFIX}{{{name}}}"
        self.breaker = breaker
        self.guard = (
            None
            if breaker is None
            else Guard(f"{self.scope}:breaker", breaker.failures, breaker.seconds, breaker.pause)
        )
        try:
            self._signature: inspect.Signature | None = inspect.signature(function)
        except (TypeError, ValueError):
            self._signature = None
        for option in (unique, *limits):
            if option is not None:
                self.check(type(option).__name__, option.by)
        # Where a named argument is among those that are given by position: what a key is made of is found without binding them.
        parameters = self._signature.parameters.values() if self._signature is not None else ()
        self._positions = {
            parameter.name: index if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD else sys.maxsize
            for index, parameter in enumerate(parameters)
            if parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        }
        # The limits by the names that people and logs have for them.
        self.titles = {_title(limit): limit for limit in self.limits}
        self._fixed = tuple(self._bound_of(limit, None) for limit in self.limits if limit.by is None)
        # The limits of keys that were asked for lately.
        self._recent: dict[tuple[object, ...], Bound] = {}

    def check(self, option: str, by: By) -> None:
        """Raises: WrongValue for arguments that the function does not have."""
        if by is None or callable(by) or self._signature is None:
            return
        parameters = self._signature.parameters
        if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
            return
        for name in by:
            if name not in parameters:
                hint = did_you_mean(name, parameters)
                raise WrongValue(f"task {self.name}: {option} is by {name!r}, which is no argument of it.{hint}")

    def unique_key(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """Raises: TypeError for arguments that the function does not take; what a function `by` raises."""
        assert self.unique is not None
        by = self.unique.by
        if by is None:
            bound = self._bound(args, kwargs)
            return self._key("unique", "", bound)
        return self._key("unique", label_of(by), self.values(by, args, kwargs))

    def bounds(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Bound, ...]:
        """The limits of a call. Raises: as `unique_key`."""
        if len(self._fixed) == len(self.limits):
            return self._fixed
        limit_bounds = []
        fixed = iter(self._fixed)
        for number, limit in enumerate(self.limits):
            if limit.by is None:
                limit_bounds.append(next(fixed))
                continue
            values = self.values(limit.by, args, kwargs)
            parts = values if values.__class__ is list else [values]
            if not all(map(_is_small, parts)):
                limit_bounds.append(self._bound_of(limit, values))
                continue
            # 1, 1.0 and True are one key of a dictionary, and three of ours.
            recent = (number, values.__class__, *parts, *map(type, parts))
            bound = self._recent.get(recent)
            if bound is None:
                if len(self._recent) >= _MOST_RECENT:
                    self._recent.clear()
                bound = self._recent[recent] = self._bound_of(limit, values)
            limit_bounds.append(bound)
        return tuple(limit_bounds)

    def _bound_of(self, limit: Limit, values: object) -> Bound:
        key, title = self._key(type(limit).__name__.lower(), label_of(limit.by), values), _title(limit)
        text = ""
        if limit.by is not None:
            words = ", ".join(map(str, values)) if isinstance(values, list) else str(values)
            text = printable(words, _LONGEST_TEXT) if self._tells_keys else key[-8:]
        if isinstance(limit, Concurrency):
            return Bound(key, title, places=limit.limit, text=text)
        return Bound(key, title, interval=limit.interval, burst=limit.burst or 1, text=text)

    def lock(self, key: str, *, is_taken: bool) -> Lock:
        """The lock of a call with that key."""
        assert self.unique is not None
        return Lock(key, self.unique.ttl, self.unique.until, is_taken)

    def is_key(self, key: object) -> bool:
        """Whether a message's header may name this key."""
        return isinstance(key, str) and len(key) < _LONGEST_KEY and key.startswith(f"{self.scope}:unique:")

    def _bound(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        if self._signature is None:
            return {"args": list(args), "kwargs": dict(kwargs)}
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    def values(self, by: By, args: Sequence[Any], kwargs: Mapping[str, Any]) -> object:
        """What a call's key is made of. Raises: as `unique_key`."""
        if callable(by):
            return by(*args, **kwargs)
        try:
            return [
                kwargs[name] if self._positions[name] >= len(args) else args[self._positions[name]] for name in by or ()
            ]
        except KeyError:  # a default, or not among the named ones
            bound = self._bound(args, kwargs)
        variadic: Mapping[str, Any] = next((value for name, value in bound.items() if self._is_others(name)), {})
        return [bound[name] if name in bound else variadic.get(name) for name in by or ()]

    def _is_others(self, name: str) -> bool:
        assert self._signature is not None
        return self._signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD

    def _key(self, option: str, label: str, values: object) -> str:
        # (The module `hashlib` would be imported into every process; this imports it with the first key.)
        digest = uuid.uuid5(uuid.NAMESPACE_OID, canonical_text(values)).hex
        return f"{self.scope}:{option}:{label[:60]}:{digest}"


def plan_of(
    name: str,
    function: Callable[..., Any],
    unique: Unique | None,
    limits: Sequence[Limit] | None,
    breaker: Breaker | None = None,
    *,
    tells_keys: bool,
) -> FlowPlan | None:
    """The plan of a task; None for one that asks for nothing. `tells_keys`: operators may see the values of limits' keys.

    Raises: WrongValue."""
    if unique is None and not limits and breaker is None:
        return None
    return FlowPlan(name, function, unique, limits or (), breaker, tells_keys=tells_keys)


# -- which shard of its queue a call of a task with `fair_by` goes to


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


def _is_small(value: object) -> bool:
    """Whether a part of a key is plain, and short enough to be remembered in each process."""
    return value.__class__ in _PLAIN and (not isinstance(value, str) or len(value) <= _LONGEST_TEXT)


def _title(limit: Limit) -> str:
    limit_type, label = type(limit).__name__.lower(), label_of(limit.by)
    return f"{limit_type} by {label}" if label else limit_type


def canonical_text(value: object) -> str:
    """The value as text, which is the same before and after the message's journey. Raises: EncodeError."""
    return json.dumps(_canonical(value), sort_keys=True)


def _canonical(value: object) -> object:
    """The value as JSON writes it, so that a key is the same before and after the message's journey. Raises: EncodeError."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Mapping):
        return {str(name): _canonical(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(json.dumps(_canonical(item), sort_keys=True) for item in value)
    return dumps(value, "json").body.decode()
