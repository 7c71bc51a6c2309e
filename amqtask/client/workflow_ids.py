"""Ids for a composition, and the calls it begins with; no I/O.

`settle` pushes the options of chains, groups and chords down to the tasks that they are for; `Freezer.freeze` fixes an id for
every task and makes the result that the caller holds; `begin` says which calls are published now. The rest of the composition
travels with those calls, in Celery's own form, so that a worker of either system can go on with it:

    chain   the first step carries the others, reversed, as `chain`
    chord   every member of the header carries the body as `chord`, the group's id and its own index
    group   its members, with the group's id and their index

Every member of a chord's header is one part of the chord. A member that would end in a group (a chain whose last step is one)
gets `celery.accumulate` behind it, so that its part is the list of that group's results.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from amqtask.calls.signature import Signature, listed
from amqtask.canvas import ACCUMULATE, as_signature, chain, chord, group, piped
from amqtask.exceptions import ConfigurationError
from amqtask.execution.follow_ups import body_id
from amqtask.flow.deadline import HEADER as DEADLINE
from amqtask.protocol.chord import SIZE, TOKEN, new_token
from amqtask.result import AsyncResult
from amqtask.results import GroupResult

if TYPE_CHECKING:
    from amqtask.execution.context import Context
    from amqtask.ground.shapes import Arguments, HeaderDict, KeywordDict, Keywords, Options, SignatureFields
    from amqtask.result import UntypedResult

Result = AsyncResult[Any] | GroupResult
# Options that belong to one task of a composition and never to all.
_OWN = frozenset({"task_id", "group_id", "group_index", "chord", "chain", "root_id", "parent_id", "reply_to"})
_TIMES = frozenset({"countdown", "eta"})


class Begun(NamedTuple):
    """What a composition begins with: calls to publish, and the chords (group id → size) that these are the header of."""

    calls: list[Signature]
    chords: dict[str, int]
    says_size: bool
    # Of chords that the broker counts: group id → what the name of its queue ends in.
    tokens: dict[str, str]
    # Of all: group id → the id of its body.
    body_ids: dict[str, str]


# -- options where they belong


def settle(unsettled: object, options: Options | None = None) -> Signature:
    """A copy in which only tasks have options, but for ids; `options` are those of the call. Raises: ConfigurationError."""
    # Copy the composition itself only: its parts are settled, and copied, one by one.
    sig = Signature.clone(as_signature(unsettled), None, None, **(options or {}))
    if isinstance(sig, (chain, group, chord)) and sig.options.get("chain"):
        # A Celery worker that was about to publish it has put the steps that follow into its options.
        later_steps = sig.options.pop("chain")
        return settle(piped(sig, chain(list(reversed(later_steps)))))
    if isinstance(sig, chain):
        return _settled_chain(sig)
    if isinstance(sig, group):
        return _settled_group(sig)
    if isinstance(sig, chord):
        return _settled_chord(sig)
    return sig


def _ids(options: Options) -> dict[str, object]:
    return {key: value for key, value in options.items() if key in _OWN}


def _settled_chain(sig: chain) -> Signature:
    if not len(sig):
        return _settled_group(group(app=sig.bound_app))  # nothing begins, and nobody waits for it
    steps = [settle(step) for step in chain(sig.unchain_tasks()).tasks]
    settled = chain(app=sig.bound_app)
    settled["kwargs"] = {"tasks": steps}
    settled["options"] = {key: value for key, value in _ids(sig.options).items() if key in ("root_id", "parent_id")}
    return settled


def _settled_group(sig: group) -> Signature:
    settled = group(_settled_members(sig), app=sig.bound_app)
    settled["options"] = _ids(sig.options)
    return settled


def _settled_members(sig: group) -> list[Signature]:
    options = dict(sig.options)
    callbacks, errbacks = listed(options.pop("link", None)), listed(options.pop("link_error", None))
    shared = {key: value for key, value in options.items() if key not in _OWN}
    members: list[Signature] = []
    for member in sig.tasks:
        members += _flat(settle(member, shared))
    if members and callbacks:
        members[0].extend_list_option(
            "link", [as_signature(callback).clone().set(immutable=True) for callback in callbacks]
        )
    for member in members:
        for errback in errbacks:
            member.link_error(as_signature(errback).clone())
    return members


def _flat(member: Signature) -> list[Signature]:
    if isinstance(member, group):
        return [leaf for inner in member.tasks for leaf in _flat(inner)]
    if isinstance(member, chain) and len(member) == 1:
        return _flat(member.tasks[0])
    return [member]


def _settled_chord(sig: chord) -> Signature:
    body = sig.body
    if body is None:
        raise ConfigurationError(f"a chord needs a body: {sig!r}")
    options = dict(sig.options)
    times = {key: options.pop(key) for key in _TIMES & options.keys()}
    callbacks, errbacks = listed(options.pop("link", None)), listed(options.pop("link_error", None))
    shared = {key: value for key, value in options.items() if key not in _OWN}
    ids = _ids(options)
    gid = ids.pop("task_id", None)
    body = body.clone(None, None, **shared)
    for callback in callbacks:
        body.link(callback)
    for errback in errbacks:
        body.link_error(errback)
    header = group(sig.tasks, app=sig.bound_app)
    header["options"] = {**shared, **times}
    members = [single(member) for member in _settled_members(header)]
    settled = chord(members, settle(body), app=sig.bound_app)
    settled["options"] = {**ids, **({"task_id": gid} if gid else {})}
    return settled


def single(sig: Signature) -> Signature:
    """A settled signature that ends in one task: what ends in a group ends in the list of its results instead."""
    if isinstance(sig, group):
        return settle(chord(sig, _accumulate(sig), app=sig.bound_app))
    if isinstance(sig, chain) and _ends_in_group(sig):
        steps = sig.tasks
        return settle(chain([*steps[:-1], single(steps[-1])], app=sig.bound_app))
    if isinstance(sig, chord) and _ends_in_group(sig):
        longer = sig.clone()
        assert isinstance(longer, chord)
        assert longer.body is not None
        longer.body = single(longer.body)
        return longer
    return sig


def _ends_in_group(sig: Signature) -> bool:
    if isinstance(sig, chain):
        return _ends_in_group(sig.tasks[-1])
    if isinstance(sig, chord):
        assert sig.body is not None
        return _ends_in_group(sig.body)
    return isinstance(sig, group)


def _accumulate(sig: Signature) -> Signature:
    return Signature(ACCUMULATE, (), {"index": 0}, app=sig.bound_app)


def end_of(sig: Signature, change: Callable[[Signature], None]) -> None:
    """Change the task that a settled signature ends in (for a group: each member's), in place."""
    if isinstance(sig, chain):
        steps = sig.tasks
        end_of(steps[-1], change)
        sig.tasks = steps
    elif isinstance(sig, chord):
        body = sig.body
        assert body is not None
        end_of(body, change)
        sig.body = body
    elif isinstance(sig, group):
        members = sig.tasks
        for member in members:
            end_of(member, change)
        sig.tasks = members
    else:
        change(sig)


# -- deadlines


def bind_bodies(sig: Signature, context: Context) -> None:
    """Bind the bodies of chords that begin in a run to its deadline, in place: they are published where nobody knows of the run.
    All others take the deadline from the message before theirs."""
    request = context.request
    if request is None or DEADLINE not in request.headers:
        return
    _bind_bodies(sig, {DEADLINE: request.headers[DEADLINE]})


def _bind_bodies(sig: Signature, deadline: HeaderDict) -> None:
    if isinstance(sig, chord) and sig.body is not None:
        body = sig.body
        _bind_first(body, deadline)
        sig.body = body
    elif isinstance(sig, (group, chain)):
        parts = sig.tasks
        for part in parts if isinstance(sig, group) else parts[:1]:
            _bind_bodies(part, deadline)
        sig.tasks = parts


def _bind_first(sig: Signature, deadline: HeaderDict) -> None:
    if isinstance(sig, (group, chain, chord)):
        parts = sig.tasks
        for part in parts[:1] if isinstance(sig, chain) else parts:
            _bind_first(part, deadline)
        sig.tasks = parts
        _bind_bodies(sig, deadline)
    else:
        sig.options["headers"] = {**(sig.options.get("headers") or {}), **deadline}


# -- ids


def random_id() -> str:
    """An id that nothing else has."""
    return str(uuid.uuid4())


class Place(NamedTuple):
    """Where a part of a composition stands.

    `membership` is what the task at its end belongs to (group_id, group_index, chord); `task_id` is that task's id.
    `parent` is the result that it follows from. What `is_head` begins now; anything else learns its root when it begins.
    """

    task_id: str | None = None
    membership: Options | None = None
    root_id: str | None = None
    parent_id: str | None = None
    parent: Result | None = None
    is_head: bool = True


class Freezer:
    """Fixes ids. `reply_to` is the caller's reply queue ("" without one); `result` makes a result of an id and a task's name,
    `group_result` one of an id and its members' results, `new_id` the ids."""

    def __init__(
        self,
        reply_to: str,
        result: Callable[[str, str, Result | None], UntypedResult],
        group_result: Callable[[str, list[Result], Result | None], GroupResult],
        new_id: Callable[[], str] | None = None,
    ) -> None:
        self._reply_to = reply_to
        self._result = result
        self._group_result = group_result
        self._new_id = new_id or random_id

    def freeze(self, sig: Signature, place: Place | None = None) -> Result:
        """Give a settled signature its ids, in place, where it has none; its result."""
        place = place or Place()
        if isinstance(sig, chain):
            return self._chain(sig, place)
        if isinstance(sig, group):
            return self._group(sig, place)
        if isinstance(sig, chord):
            return self._chord(sig, place)
        options = sig.options
        fixed_id = options.setdefault("task_id", place.task_id or self._new_id())
        for key, value in (place.membership or {}).items():
            if value is not None:
                options.setdefault(key, value)
        if place.root_id is not None:
            options.setdefault("root_id", place.root_id)
        if place.parent_id is not None:
            options.setdefault("parent_id", place.parent_id)
        if self._reply_to:
            options.setdefault("reply_to", self._reply_to)
        return self._result(fixed_id, sig.task, place.parent)

    def _chain(self, sig: chain, place: Place) -> Result:
        steps = sig.tasks
        root_id = sig.options.get("root_id") or place.root_id
        parent_id = sig.options.get("parent_id") or place.parent_id
        result: Any = place.parent
        for position, step in enumerate(steps):
            end = place if position == len(steps) - 1 else Place()
            is_head = place.is_head and not position
            if place.is_head and root_id is None and not isinstance(step, (group, chord)):
                root_id = step.options.setdefault("task_id", end.task_id or self._new_id())
            # A later step learns its root and its parent from the one before, when that has run: the message is shorter.
            ids = (None, None) if position else (root_id, parent_id)
            result = self.freeze(step, Place(end.task_id, end.membership, *ids, result, is_head))
        sig.tasks = steps
        last_result: Result = result
        sig.options["task_id"] = last_result.id
        return last_result

    def _group(self, sig: group, place: Place) -> Result:
        group_id = sig.options.setdefault("task_id", place.task_id or self._new_id())
        membership = {"group_id": group_id, "group_index": None, "chord": (place.membership or {}).get("chord")}
        results = self._members(sig, membership, place)
        if len(results) == 1 and isinstance(results[0], GroupResult):
            return results[0]  # group(a | group(b, c)): Celery's special case
        return self._group_result(group_id, results, place.parent)

    def _members(self, sig: group | chord, membership: Options, place: Place) -> list[Result]:
        members = sig.tasks
        inner = Place(None, None, place.root_id, place.parent_id, None, place.is_head)
        results = [
            self.freeze(member, inner._replace(membership={**membership, "group_index": index}))
            for index, member in enumerate(members)
        ]
        sig.tasks = members
        return results

    def _chord(self, sig: chord, place: Place) -> Result:
        # `chord.set(task_id=…)` names the body as well as the group (Celery's rule).
        task_id = place.task_id or sig.options.get("task_id")
        group_id = sig.options.setdefault("task_id", self._new_id())
        body = sig.body
        assert body is not None
        # The group's id is set when the chord begins: a Celery worker that comes to that gives it another.
        header = self._group_result(group_id, self._members(sig, {}, place), place.parent)
        body_result = self.freeze(body, Place(task_id, place.membership, place.root_id, None, header, is_head=False))
        sig.body = body
        return body_result


# -- beginning


def begin(
    sig: Signature,
    args: Iterable[object] = (),
    kwargs: Keywords | None = None,
    continuation: list[SignatureFields] | None = None,
    *,
    says_size: bool = True,
) -> Begun:
    """The calls that a settled, frozen signature begins with. `continuation` is what follows it, reversed as in a message.

    `says_size`: the broker counts parts, and bodies carry the size of their header and a token (not where a store counts:
    Celery takes the size for an option of a chord).
    """
    begun = Begun([], {}, says_size, {}, {})
    _begin(sig, tuple(args), dict(kwargs or {}), continuation or [], begun)
    return begun


def _begin(
    sig: Signature, args: Arguments, kwargs: KeywordDict, later_steps: list[SignatureFields], begun: Begun
) -> None:
    if isinstance(sig, chain):
        steps = sig.tasks
        _begin(steps[0], args, kwargs, [*later_steps, *reversed(steps[1:])], begun)
    elif isinstance(sig, group):
        if later_steps:
            # A chain of Celery's: ours have a chord here.
            _begin(settle(chord(sig, chain(list(reversed(later_steps))))), args, kwargs, [], begun)
            return
        for member in sig.tasks:
            _begin(member, args, kwargs, [], begun)
    elif isinstance(sig, chord):
        _begin_chord(sig, args, kwargs, later_steps, begun)
    else:
        call = sig.clone(args, kwargs) if args or kwargs else sig
        if later_steps:
            call["options"] = {**call.options, "chain": [*later_steps, *(call.options.get("chain") or ())]}
        begun.calls.append(call)


def _led_by_a_task(body: Signature) -> Signature:
    """A chain as its first step that carries the others: where a header fails, Celery looks for the body's id in its options."""
    if not isinstance(body, chain):
        return body
    first, *later_steps = body.tasks
    led = first.clone()
    if later_steps:
        led.options["chain"] = [*(led.options.get("chain") or ()), *reversed(later_steps)]
    return led


def _begin_chord(
    sig: chord, args: Arguments, kwargs: KeywordDict, later_steps: list[SignatureFields], begun: Begun
) -> None:
    body, members, group_id = sig.body, sig.tasks, sig.options.get("task_id") or random_id()
    assert body is not None
    if later_steps:
        body = settle(piped(body, chain(list(reversed(later_steps)))))
    if not members:
        _begin(body, ([],), {}, [], begun)
        return
    begun.chords[group_id] = len(members)
    carried = dict(_led_by_a_task(body))
    begun.body_ids[group_id] = body_id(carried)
    if begun.says_size:
        carried[SIZE] = len(members)
        carried[TOKEN] = begun.tokens[group_id] = new_token()
    for index, member in enumerate(members):
        membership = {"chord": carried, "group_id": group_id, "group_index": index}
        end_of(member, lambda end, membership=membership: end.options.update(membership))  # type: ignore[misc]
        _begin(member, args, kwargs, [], begun)
