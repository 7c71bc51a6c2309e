"""Several results at once (ResultSet, and GroupResult, the results of a group); what led to what; who may wait for others."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TextIO, cast

from amqtask import states
from amqtask.exceptions import BackendNotConfigured, ChordError, TimeoutError
from amqtask.execution.context import current
from amqtask.ground.current import current_app
from amqtask.ground.deadlines import cancel_all
from amqtask.ground.plugins import WithOthersNames

if TYPE_CHECKING:
    from amqtask.backends.contract import ResultBackend
    from amqtask.protocol.result import ResultMessage


_join_allowed: ContextVar[bool] = ContextVar("amqtask_join_allowed", default=False)


class DependencyGraph:
    """Results and, for each, which it led to: who published whom (Celery's DependencyGraph, as far as results use it)."""

    def __init__(self) -> None:
        self.adjacent: dict[Hashable, list[Hashable]] = {}

    def add_arc(self, node: Hashable) -> None:
        """A node."""
        self.adjacent.setdefault(node, [])

    def add_edge(self, node: Hashable, following: Hashable) -> None:
        """`node` led to `following`."""
        self.add_arc(node)
        self.add_arc(following)
        self.adjacent[node].append(following)

    def topsort(self) -> list[Any]:
        """The nodes, each after all that it led to."""
        ordered: dict[Hashable, None] = {}

        def visit(node: Hashable) -> None:
            for following in self.adjacent[node]:
                if following not in ordered:
                    visit(following)
            ordered[node] = None

        for node in self.adjacent:
            if node not in ordered:
                visit(node)
        return list(ordered)

    def to_dot(self, file: TextIO | None = None) -> str:
        """The graph in Graphviz's language; written to `file` too, if one is given."""
        lines = ["digraph dependencies {"]
        lines += [f'    "{node}";' for node in self.adjacent]
        lines += [f'    "{node}" -> "{following}";' for node, targets in self.adjacent.items() for following in targets]
        text = "\n".join([*lines, "}", ""])
        if file is not None:
            file.write(text)
        return text

    def __iter__(self) -> Iterator[Any]:
        return iter(self.adjacent)

    def __len__(self) -> int:
        return len(self.adjacent)

    def __contains__(self, node: object) -> bool:
        return node in self.adjacent


class WithDescendants:
    """A result that knows what its task led to."""

    def iterdeps(self, timeout: float | None = None, **_: object) -> Iterator[tuple[Any, Any]]:
        """This result and those of what its task published, and so on, as (publisher's result, result); each is waited
        for before its children are known."""
        waiting: deque[tuple[Any, Any]] = deque([(None, self)])
        while waiting:
            parent, result = waiting.popleft()
            yield parent, result
            result.get(timeout)
            waiting.extend((result, child) for child in result.children or ())

    def collect(self, timeout: float | None = None, **_: object) -> Iterator[tuple[Any, Any]]:
        """This result and those of what its task published, and so on, as (result, value)."""
        for _parent, result in self.iterdeps(timeout):
            yield result, result.get(timeout)

    @property
    def graph(self) -> DependencyGraph:
        """The graph of this result and of the tasks that it led to, each waited for."""
        return self.build_graph()

    def build_graph(self, timeout: float | None = None, **_: object) -> DependencyGraph:
        """The graph of results, with `timeout` seconds for each."""
        graph = DependencyGraph()
        for parent, result in self.iterdeps(timeout):
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


def ids_in_tree(result: Any) -> dict[str, None]:
    """The ids of a result, of those before it and of the members of groups among them, as far as the caller holds them."""
    ids: dict[str, None] = {}
    waiting = deque([result])
    while waiting:
        one = waiting.popleft()
        one_id = getattr(one, "id", None)  # several results that are no group have none
        if one_id in ids:
            continue
        if one_id is not None:
            ids[one_id] = None
        waiting.extend(getattr(one, "results", ()))
        parent = getattr(one, "parent", None)
        if parent is not None:
            waiting.append(parent)
    return ids


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
            meant = list(ids_in_tree(self)) if tree else ids
            revoke(meant, tree=tree, terminate=terminate, signal=signal, wait=wait, timeout=timeout)

    async def acancel(self, *, tree: bool = True, terminate: bool = False, signal: str | None = None) -> None:
        """The same as `cancel`."""
        await asyncio.to_thread(self.cancel, tree=tree, terminate=terminate, signal=signal)


# -- several results


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

    def _by_id(self) -> dict[str, OneResult]:
        return {result.id: result for result in self._flat()}

    def _arriving(self, timeout: float | None) -> Iterator[OneResult]:
        """Each member as it becomes ready (those that are first), in one pass over the store.

        Raises: TimeoutError when the rest does not come within `timeout` seconds."""
        waiting: dict[str, OneResult] = {}
        for result in self._by_id().values():
            if result.final_meta is None and not result.ignored:
                waiting[result.id] = result
            else:
                yield result
        if waiting:
            store = next(iter(waiting.values())).result_store
            for task_id, final in store.iter_ready(list(waiting), timeout=timeout):
                waiting[task_id].final_meta = final
                yield waiting[task_id]

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
        on_message: object = None,
        disable_sync_subtasks: bool = True,
        on_interval: object = None,
    ) -> list[Any]:
        """All values, in the order of the calls, within `timeout` seconds.

        The first failure that comes is raised at once, unless `propagate` is False.
        """
        check_not_in_task(disable_sync_subtasks)
        for result in self._arriving(timeout):
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

    def iter_native(self, timeout: float | None = None, **_: object) -> Iterator[tuple[str, dict[str, Any]]]:
        """(id, meta) as they come."""
        for result in self._arriving(timeout):
            yield result.id, result.latest_meta().as_meta()

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
        for result in self.results:
            result.forget()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    def __getitem__(self, index: int) -> Any:
        return self.results[index]

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
        return [self.id, *(self.parent.as_list() if self.parent else [])]

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
        return (self.id, self.parent.as_tuple() if self.parent else None), [
            result.as_tuple() for result in self.results
        ]

    __json__ = as_tuple

    def __str__(self) -> str:
        return self.id


def _group_store(backend: ResultBackend | None) -> ResultBackend:
    if backend is None:
        from amqtask.backends.contract import NO_GROUPS

        raise BackendNotConfigured(NO_GROUPS)
    return backend
