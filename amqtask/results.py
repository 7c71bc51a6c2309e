"""Several results at once (ResultSet, and GroupResult, the results of a group); what led to what; who may wait for others."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import math
import time
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

from amqtask import states
from amqtask.exceptions import BackendNotConfigured, ChordError, TimeoutError
from amqtask.execution.context import current
from amqtask.ground.current import current_app
from amqtask.ground.deadlines import cancel_all, end_of
from amqtask.ground.graph import DependencyGraph, before, tuple_of
from amqtask.ground.plugins import WithOthersNames

if TYPE_CHECKING:
    from amqtask.backends.contract import ResultBackend
    from amqtask.ground.shapes import JsonObject
    from amqtask.protocol.result import ResultMessage


# Seconds between two looks of somebody who waits, at the least.
_SHORTEST = 0.01
_join_allowed: ContextVar[bool] = ContextVar("amqtask_join_allowed", default=False)


def as_task_id(task_id: object) -> str:
    """An id as results have it: text. Raises: ValueError for None."""
    if task_id is None:
        raise ValueError("AsyncResult requires valid id, not None: was the call made?")
    return str(task_id)


class WithDescendants:
    """A result that knows what its task led to."""

    def iterdeps(
        self,
        timeout: float | None = None,
        *,
        intermediate: bool = False,
        disable_sync_subtasks: bool = True,
        **_: object,
    ) -> Iterator[tuple[Any, Any]]:
        """This result and those of what its task published, and so on, as (publisher's result, result); each is waited for before
        its children are known. With `intermediate` nothing is waited for: those that are known now. Each comes once: a task may
        publish itself anew under its own id."""
        waiting: deque[tuple[Any, Any]] = deque([(None, self)])
        seen = set()
        while waiting:
            parent, result = waiting.popleft()
            if result in seen:
                continue
            seen.add(result)
            yield parent, result
            if not intermediate:
                # Also a task that failed may have published others.
                result.get(timeout, propagate=False, disable_sync_subtasks=disable_sync_subtasks)
            waiting.extend((result, child) for child in result.children or ())

    def collect(
        self,
        timeout: float | None = None,
        *,
        intermediate: bool = False,
        propagate: bool = True,
        disable_sync_subtasks: bool = True,
        **_: object,
    ) -> Iterator[tuple[Any, Any]]:
        """This result and those of what its task published, and so on, as (result, value). The error of a task that failed is
        raised; with `propagate` False it is the value."""
        for _parent, result in self.iterdeps(
            timeout, intermediate=intermediate, disable_sync_subtasks=disable_sync_subtasks
        ):
            yield result, result.get(timeout, propagate=propagate, disable_sync_subtasks=disable_sync_subtasks)

    @property
    def graph(self) -> DependencyGraph:
        """The graph of this result and of the tasks that it led to, each waited for."""
        return self.build_graph()

    def build_graph(self, timeout: float | None = None, *, intermediate: bool = False, **_: object) -> DependencyGraph:
        """The graph of results, with `timeout` seconds for each; with `intermediate` as far as it is known now."""
        graph = DependencyGraph()
        for parent, result in self.iterdeps(timeout, intermediate=intermediate):
            if parent is None:
                graph.add_arc(result)
            else:
                graph.add_edge(parent, result)
        return graph

    def get_leaf(self, timeout: float | None = None) -> Any:
        """The value of the last result of `collect`."""
        return [value for _, value in self.collect(timeout)][-1]


# -- whether a task may wait for other tasks' results


@contextlib.contextmanager
def allow_join_result() -> Iterator[None]:
    """Let the block wait for results inside a task."""
    token = _join_allowed.set(True)
    try:
        yield
    finally:
        _join_allowed.reset(token)


def check_not_in_task(disable_sync_subtasks: bool) -> None:
    """Raises: RuntimeError where waiting could take the slot that the awaited task needs."""
    context = current.get()
    if disable_sync_subtasks and context is not None and not context.is_eager and not _join_allowed.get():
        raise RuntimeError(
            "Never call result.get() within a task: it occupies a slot that the awaited task may need. Use a chain or a "
            "callback, or say disable_sync_subtasks=False if you know that it cannot deadlock."
        )


# -- what belongs together


def tree_of(result: Any) -> dict[str, Any]:
    """A result, those before it and the members of groups among them, by id, as far as the caller holds them."""
    found: dict[str, Any] = {}
    waiting = deque([result])
    while waiting:
        one = waiting.popleft()
        one_id = getattr(one, "id", None)  # several results that are no group have none
        if one_id in found:
            continue
        if one_id is not None:
            found[one_id] = one
        waiting.extend(getattr(one, "results", ()))
        parent = getattr(one, "parent", None)
        if parent is not None:
            waiting.append(parent)
    return found


def forget_tree(result: Any) -> None:
    """Drop a result, and those before it, here and in the store."""
    for one in tree_of(result).values():
        one.drop()


class Cancellable:
    """A result or several: what can be cancelled."""

    def ids_by_revoker(self) -> dict[Callable[..., None], list[str]]:
        """The ids of the tasks, by what revokes them. Raises: BackendNotConfigured for one of no application."""
        raise NotImplementedError

    def cancel(
        self,
        *,
        tree: bool = True,
        terminate: bool = False,
        signal: str | None = None,
        wait: bool = False,
        timeout: float | None = None,
    ) -> None:
        """Revoke it, ask it to end if it runs (`self.is_cancelled()`), and with `tree` the same for the whole workflow that it is
        known to belong to: the steps before it, members of its groups and all that any of them has called or will call. One
        message, however many they are; the rest is as with `revoke`.

        Raises: PublishError, BackendNotConfigured.
        """
        for revoke, ids in self.ids_by_revoker().items():
            meant = list(tree_of(self)) if tree else ids
            revoke(meant, tree=tree, terminate=terminate, signal=signal, wait=wait, timeout=timeout)

    async def acancel(self, *, tree: bool = True, terminate: bool = False, signal: str | None = None) -> None:
        """The same as `cancel`."""
        await asyncio.to_thread(self.cancel, tree=tree, terminate=terminate, signal=signal)


# -- several results


def each_end(
    store: ResultBackend,
    task_ids: Sequence[str],
    timeout: float | None,
    *,
    interval: float = 0.5,
    look: Callable[[], object] | None = None,
) -> Generator[tuple[str, ResultMessage], None, None]:
    """Each result as it becomes ready, all within `timeout` seconds; `look` is called each `interval` seconds meanwhile.

    Raises: TimeoutError, BackendUnreachable."""
    if look is None:
        yield from store.iter_ready(task_ids, timeout=timeout)
        return
    deadline = math.inf if timeout is None else end_of(timeout)
    missing = dict.fromkeys(task_ids)
    while True:
        remaining = max(0.0, deadline - time.monotonic())
        with contextlib.suppress(TimeoutError):
            for task_id, final in store.iter_ready(list(missing), timeout=min(max(interval, _SHORTEST), remaining)):
                del missing[task_id]
                yield task_id, final
        if not missing:
            return
        if time.monotonic() >= deadline:
            from amqtask.backends.contract import too_late

            raise too_late(task_ids, len(missing), timeout)
        look()


class OneResult(Protocol):
    """What several results need of one of them, an AsyncResult."""

    id: str
    ignored: bool
    final_meta: ResultMessage | None  # how it ended, once that was read
    revoke_call: Callable[..., None] | None

    @property
    def result_store(self) -> ResultBackend:
        """Raises: BackendNotConfigured."""

    def latest_meta(self) -> ResultMessage:
        """What is known of it now."""

    def maybe_throw(self, propagate: bool = True, callback: Callable[[str, Any], object] | None = None) -> Any:
        """Raise the error of a task that failed, else return what is known."""

    def error_of(self, final: ResultMessage) -> BaseException:
        """The error of a task that failed."""

    def then(self, callback: Callable[[Any], object], on_error: Callable[[Any], object] | None = None) -> Any:
        """Call it when the task has ended."""

    def error_in_header(self) -> BaseException | None:
        """Why the chord before this one failed, if it is known."""

    @property
    def revoke(self) -> Callable[..., None]:
        """Tell all workers not to run it."""


class ResultSet(Cancellable, WithOthersNames):
    """Several results at once."""

    def __init__(
        self,
        results: Iterable[Any] = (),
        backend: ResultBackend | None = None,
        *,
        app: Any = None,
        ready_barrier: object = None,
    ) -> None:
        """`app` gives the store when `backend` does not; `ready_barrier` is accepted for Celery's sake."""
        self.results: list[Any] = list(results)
        self._backend = backend if backend is not None or app is None else app.backend

    def add(self, result: Any) -> None:
        """Add a result."""
        if result not in self.results:
            self.results.append(result)

    def discard(self, result: Any) -> None:
        """Remove a result, if it is there."""
        if result in self.results:
            self.results.remove(result)

    def remove(self, result: Any) -> None:
        """Remove a result. Raises: KeyError when it is not there."""
        if result not in self.results:
            raise KeyError(result)
        self.results.remove(result)

    def update(self, results: Iterable[Any]) -> None:
        """Add the results that are not there yet."""
        for result in results:
            self.add(result)

    def clear(self) -> None:
        """Remove all results."""
        self.results.clear()

    def _flat(self) -> list[OneResult]:
        flat: list[OneResult] = []
        for result in self.results:
            flat += result._flat() if isinstance(result, ResultSet) else [result]
        return flat

    def _arriving(
        self,
        timeout: float | None,
        *,
        interval: float = 0.5,
        on_message: Callable[[JsonObject], object] | None = None,
        on_interval: Callable[[], object] | None = None,
    ) -> Iterator[OneResult]:
        """Each member as it becomes ready (those that are first), in one pass over each store: members may be of several apps.

        Raises: TimeoutError when the rest does not come within `timeout` seconds."""
        waiting: dict[str, list[OneResult]] = {}  # the same task may be there twice
        for result in self._flat():
            if result.final_meta is None and not result.ignored:
                waiting.setdefault(result.id, []).append(result)
            else:
                yield result
        deadline = math.inf if timeout is None else end_of(timeout)
        by_store: dict[int, list[str]] = {}
        for task_id, (result, *_) in waiting.items():
            by_store.setdefault(id(result.result_store), []).append(task_id)
        for task_ids in by_store.values():
            store = waiting[task_ids[0]][0].result_store
            left = timeout if len(by_store) == 1 or timeout is None else max(0.0, deadline - time.monotonic())
            for task_id, final in each_end(store, task_ids, left, interval=interval, look=on_interval):
                if on_message is not None:
                    on_message(final.as_meta())
                for result in waiting[task_id]:
                    result.final_meta = final
                yield from waiting[task_id]

    def _look(self) -> None:
        """Fetch all results that are ready now, with one question to the store."""
        try:
            for _ in self._arriving(0):
                pass
        except TimeoutError:
            pass  # some are not ready: that is an answer

    def get(
        self,
        timeout: float | None = None,
        propagate: bool = True,
        interval: float = 0.5,
        callback: Callable[[str, Any], object] | None = None,
        no_ack: bool = True,
        on_message: Callable[[JsonObject], object] | None = None,
        disable_sync_subtasks: bool = True,
        on_interval: Callable[[], object] | None = None,
    ) -> list[Any]:
        """All values, in the order of the calls, within `timeout` seconds.

        The first failure that comes is raised at once, unless `propagate` is False. `on_message` is called with the meta of each
        as it ends, `on_interval` each `interval` seconds; what it raises ends the wait.
        """
        check_not_in_task(disable_sync_subtasks)
        for result in self._arriving(timeout, interval=interval, on_message=on_message, on_interval=on_interval):
            result.maybe_throw(propagate)
        return [result.get(None, propagate, callback=callback, disable_sync_subtasks=False) for result in self.results]

    join = get
    join_native = get

    async def aget(
        self, timeout: float | None = None, propagate: bool = True, *, disable_sync_subtasks: bool = True
    ) -> list[Any]:
        """`await` all values; the first failure that comes is raised at once, unless `propagate` is False."""
        tasks = [
            asyncio.ensure_future(result.aget(timeout, propagate, disable_sync_subtasks=disable_sync_subtasks))
            for result in self.results
        ]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            await cancel_all(tasks)

    def __await__(self) -> Generator[Any, None, list[Any]]:
        return self.aget().__await__()

    def iterate(self, timeout: float | None = None, propagate: bool = True) -> Iterator[Any]:
        """Values as they come, all within `timeout` seconds."""
        for result in self._arriving(timeout):
            yield result.maybe_throw(propagate)

    def iter_native(
        self,
        timeout: float | None = None,
        interval: float = 0.5,
        no_ack: bool = True,
        on_message: Callable[[JsonObject], object] | None = None,
        on_interval: Callable[[], object] | None = None,
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """(id, meta) as they come; the rest as with `get`."""
        for result in self._arriving(timeout, interval=interval, on_message=on_message, on_interval=on_interval):
            yield result.id, result.latest_meta().as_meta()

    def then(
        self, callback: Callable[[Any], object], on_error: Callable[[Any], object] | None = None, weak: bool = False
    ) -> ResultSet:
        """Call `callback(self)` when all have ended (`on_error(self)` when one has failed, if given), from a background thread;
        now where nothing is waited for. `weak` is only accepted."""
        results = [result for result in self._flat() if not result.ignored]
        numbers = list(range(len(results)))

        def ended(_: object) -> None:
            if numbers.pop() == 0:  # one step, so of several threads one is the last
                failed = any(one.final_meta and one.final_meta.status in states.PROPAGATE_STATES for one in results)
                (on_error if failed and on_error is not None else callback)(self)

        for result in results:
            result.then(ended)
        if not results:
            callback(self)
        return self

    def ready(self) -> bool:
        """Whether all tasks ended."""
        self._look()
        return all(result.final_meta is not None for result in self._flat())

    def successful(self) -> bool:
        """Whether all tasks succeeded."""
        return self.completed_count() == len(self._flat())

    def failed(self) -> bool:
        """Whether any task failed."""
        self._look()
        return any(
            result.final_meta is not None and result.final_meta.status == states.FAILURE for result in self._flat()
        )

    def waiting(self) -> bool:
        """Whether any task has not ended."""
        return not self.ready()

    def completed_count(self) -> int:
        """How many tasks succeeded."""
        self._look()
        flat = self._flat()
        return sum(1 for result in flat if result.final_meta is not None and result.final_meta.status == states.SUCCESS)

    def maybe_throw(self, propagate: bool = True, callback: Callable[[str, Any], object] | None = None) -> None:
        """Raise the error of a member that failed, if any has."""
        self._look()
        for result in self._flat():
            result.maybe_throw(propagate, callback)

    maybe_reraise = maybe_throw

    def revoke(
        self,
        connection: object = None,
        terminate: bool = False,
        signal: str | None = None,
        wait: bool = False,
        timeout: float | None = None,
    ) -> None:
        """Revoke all, with one message; see AsyncResult.revoke."""
        for revoke, ids in self.ids_by_revoker().items():
            revoke(ids, terminate=terminate, signal=signal, wait=wait, timeout=timeout)

    def ids_by_revoker(self) -> dict[Callable[..., None], list[str]]:
        """See Cancellable."""
        by_app: dict[Callable[..., None], list[str]] = {}
        for result in self._flat():
            if result.revoke_call is None:
                result.revoke()
            else:
                by_app.setdefault(result.revoke_call, []).append(result.id)
        return by_app

    def forget(self) -> None:
        """Drop all results, here and in the store."""
        forget_tree(self)

    def drop(self) -> None:
        """Do nothing: what the store has are the members' results."""

    def __iter__(self) -> Iterator[Any]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    def __getitem__(self, index: int) -> Any:
        return self.results[index]

    def __eq__(self, other: object) -> bool:
        return self.results == other.results if isinstance(other, ResultSet) else NotImplemented

    def __reduce__(self) -> tuple[object, ...]:
        """Pickled without its store, as its members are."""
        return type(self), (self.results,)

    def __deepcopy__(self, memo: dict[int, object]) -> ResultSet:
        copied = copy.copy(self)
        copied.results = copy.deepcopy(self.results, memo)
        return copied

    def __copy__(self) -> ResultSet:
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__, results=list(self.results))
        return copied

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: [{', '.join(map(str, self.results))}]>"


class GroupResult(ResultSet):
    """The results of a group, under the group's id."""

    # The result that `as_tuple` described: set by amqtask.result, which stands above this module.
    rebuilt: ClassVar[Callable[..., Any]]

    def __init__(
        self,
        id: str | None = None,
        results: Iterable[Any] | None = (),
        backend: ResultBackend | None = None,
        parent: Any = None,
        *,
        app: Any = None,
    ) -> None:
        super().__init__(results or (), backend, app=app)
        self.id = id or str(uuid.uuid4())
        self.parent = parent

    def __eq__(self, other: object) -> bool:
        """Groups with one id, the same members and parent are equal; a text is equal to the id."""
        if isinstance(other, GroupResult):
            return (self.id, self.results, self.parent) == (other.id, other.results, other.parent)
        return self.id == other if isinstance(other, str) else NotImplemented

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.id, self.results, None, self.parent)

    def __bool__(self) -> bool:
        return True

    def __hash__(self) -> int:
        return hash(self.id)

    def first_error(self) -> BaseException | None:
        """Of the members that are known to have failed by themselves, the first one's; one look at the store."""
        self._look()
        for result in self._flat():
            if result.final_meta is None or result.final_meta.status not in states.PROPAGATE_STATES:
                continue
            error = result.error_of(result.final_meta)
            cause = result.error_in_header() if isinstance(error, ChordError) else error
            if cause is not None:
                return cause
        return None

    def as_list(self) -> list[str]:
        """Its id and those of its parents."""
        return [self.id, *(node.id for node in before(self))]

    @property
    def children(self) -> list[Any]:
        """The members."""
        return self.results

    def save(self, backend: Any = None) -> None:
        """Keep the members' ids in the result store (where the group has none, in the current application's), for
        `GroupResult.restore`.

        Raises: BackendNotConfigured when the store keeps no groups (`rpc://` does not: its results are for one process).
        """
        _group_store(backend or self._backend or current_app().backend).save_group(self.id, self.as_tuple())

    def delete(self, backend: Any = None) -> None:
        """Delete what `save` kept."""
        _group_store(backend or self._backend or current_app().backend).delete_group(self.id)

    @classmethod
    def restore(cls, id: str, backend: Any = None, app: Any = None) -> GroupResult | None:
        """The group that was saved under an id; None when there is none.

        It is looked for in `backend`, else in that of `app`, else of the current app. Raises: BackendNotConfigured.
        """
        application = current_app() if backend is None and app is None else getattr(app, "app", app)
        store = application.backend if backend is None else backend
        saved = _group_store(store).restore_group(id)
        revoke = None if application is None else application.revoke_call
        return None if saved is None else cast("GroupResult", cls.rebuilt(saved, store, revoke))

    def as_tuple(self) -> Any:
        """`((id, parent), [members])`, as Celery writes it."""
        return tuple_of(self)

    __json__ = as_tuple

    def __str__(self) -> str:
        return self.id


def _group_store(backend: ResultBackend | None) -> ResultBackend:
    if backend is None:
        from amqtask.backends.contract import NO_GROUPS

        raise BackendNotConfigured(NO_GROUPS)
    return backend
