"""What tasks, signatures and those who compose calls know of an application: its class stands above them all.

Signatures and compositions stand above this module too, and are Any here; a task is what a call asks of it (CalledTask).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, tzinfo
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from amqtask.backends.contract import ResultBackend
    from amqtask.events.client import Events
    from amqtask.execution.context import Context
    from amqtask.execution.contract import ChordStore
    from amqtask.execution.inbox import InboxRuns
    from amqtask.execution.request import Request
    from amqtask.flow.keys import FairPlan, FlowPlan
    from amqtask.ground.shapes import Arguments, KeywordDict, Keywords, Options, SignatureFields
    from amqtask.outbox.contract import Outbox
    from amqtask.pipeline import Pipeline
    from amqtask.protocol.message import Message
    from amqtask.protocol.result import ResultMessage
    from amqtask.remote.control import Control
    from amqtask.result import UntypedEagerResult, UntypedResult
    from amqtask.results import GroupResult
    from amqtask.settings import Settings
    from amqtask.topology.routes import Queues, Router
    from amqtask.transport.broker import Broker
    from amqtask.transport.contract import Publisher


class CalledTask(Protocol):
    """What a call asks of its task, where that is registered here."""

    name: str

    @property
    def ignore_result(self) -> bool | None:
        """Whether its results are not kept."""

    @property
    def serializer(self) -> str | None:
        """That of its calls, None for the app's; so are the options below."""

    @property
    def compression(self) -> str | None: ...

    @property
    def delivery_mode(self) -> int | None: ...

    @property
    def priority(self) -> int | None: ...

    @property
    def expires(self) -> object: ...

    @property
    def deadline(self) -> float | None: ...

    @property
    def flow_plan(self) -> FlowPlan | None: ...

    @property
    def fair_plan(self) -> FairPlan | None: ...

    @property
    def time_limit(self) -> float | None: ...

    @property
    def soft_time_limit(self) -> float | None: ...

    @property
    def as_data(self) -> Callable[..., tuple[Any, Any]] | None:
        """Makes models of arguments what a serializer writes; None where it takes none."""

    def shadow_name(self, args: Any, kwargs: Any, options: Any) -> str | None:
        """Another name for logs and monitors."""


class Configured(Protocol):
    """Settings, tasks, and what is made from them."""

    main: str | None
    conf: Settings
    strict_typing: bool
    is_finalized: bool

    def finalize(self, auto: bool = False) -> None:
        """Take shared tasks in and resolve the tasks' options."""

    @property
    def tasks(self) -> Mapping[str, Any]:
        """The tasks by name."""

    @property
    def task(self) -> Callable[..., Callable[[Callable[..., Any]], Any]]:
        """Makes a function a task: `@app.task(name=…)`."""

    @property
    def timezone(self) -> tzinfo:
        """That of schedules."""

    @property
    def queues(self) -> Queues:
        """Those of `task_queues`, and those created because they were named."""

    @property
    def router(self) -> Router:
        """Where calls go."""

    @property
    def backend(self) -> ResultBackend | None:
        """The result store, None when results are not kept."""

    @property
    def chord_store(self) -> ChordStore | None:
        """Where the parts of chords are counted; None: in the broker."""

    @property
    def publisher(self) -> Publisher:
        """Publishes with confirms."""

    @property
    def broker(self) -> Broker:
        """What the broker can do, and the doors to it."""

    @property
    def outbox(self) -> Outbox | None:
        """Where calls go that are made in a database transaction."""

    def make_inbox_runs(self, names: Iterable[str]) -> InboxRuns | None:
        """What puts runs of those with inbox=True into the inbox; None when none of these is one. Raises: ConfigurationError."""

    @property
    def control(self) -> Control:
        """Remote control of workers."""

    @property
    def events(self) -> Events:
        """Receive events, and send one's own."""

    def close(self) -> None:
        """Close connections; they open again when they are used again."""


class Sends(Protocol):
    """Calls and compositions that leave the process. Each raises PublishError."""

    def send_task(
        self, name: str, args: Iterable[object] | None = None, kwargs: Keywords | None = None, **options: object
    ) -> UntypedResult:
        """Publish a task by name."""

    def publish_call(
        self, name: str, args: Arguments, kwargs: KeywordDict, options: Options, task: CalledTask | None = None
    ) -> UntypedResult:
        """Publish one call, or run it here when task_always_eager says so."""

    async def apublish_call(
        self, name: str, args: Arguments, kwargs: KeywordDict, options: Options, task: CalledTask | None = None
    ) -> UntypedResult:
        """The same over the async publisher."""

    def publish_signature(self, call: Any) -> UntypedResult:
        """Publish a plain signature."""

    async def apublish_signature(self, call: Any) -> UntypedResult:
        """The same over the async publisher."""

    def publish_composition(self, composition: object, args: Arguments, kwargs: KeywordDict, options: Options) -> Any:
        """Publish what a chain, group or chord begins with; its result."""

    async def apublish_composition(
        self, composition: object, args: Arguments, kwargs: KeywordDict, options: Options
    ) -> Any:
        """The same over the async publisher."""

    def pipeline(self, *, timeout: float | None = None) -> Pipeline:
        """A block whose calls are published together."""

    def compose_call(self, call: Any) -> Message:
        """The message of one plain signature."""

    def add_to_chord(
        self, group_id: str, member: Any, *, task_id: str | None = None, chord: SignatureFields | None = None
    ) -> None:
        """Say that a chord has one more member, before that is published."""

    @property
    def revoke_call(self) -> Callable[..., None]:
        """For results: tell all workers not to run it."""


class RunsHere(Protocol):
    """Calls and compositions that run where they are made."""

    def run_inline(
        self, task: CalledTask, args: Sequence[object], kwargs: Keywords, options: Options
    ) -> UntypedEagerResult:
        """Run a task, retries and callbacks included."""

    def run_composition(
        self,
        composition: object,
        args: Arguments,
        kwargs: KeywordDict,
        options: Options,
    ) -> Any:
        """Run a chain, group or chord, one task after the other."""


class ComposesMessages(Protocol):
    """Messages of calls."""

    def compose(
        self,
        name: str,
        args: Sequence[object],
        kwargs: Keywords,
        options: Options,
        *,
        task: CalledTask | None = None,
        is_follow_up: bool = False,
    ) -> Message:
        """The message of a call, or of one that a task's end brings. Raises: TypeError, EncodeError, QueueNotFound."""

    def compose_retry(
        self, request: Request, context: Context, *, when: datetime | float | None, sig: object
    ) -> Message:
        """That of the same task again."""

    def travelled(
        self, name: str, args: Sequence[object], kwargs: Keywords, options: Options, task: CalledTask
    ) -> tuple[Any, Any]:
        """The arguments as a worker would get them. Raises: EncodeError."""


class ComposesWorkflows(Protocol):
    """Ids and places of the parts of a composition."""

    def as_member(self, composition: object, options: Options) -> Any:
        """`composition` as one member of a chord that runs."""

    def frozen(self, composition: object, options: Options) -> tuple[Any, Any]:
        """A copy with all its ids, and its result."""


class Application(Configured, Sends, RunsHere, Protocol):
    """An application."""

    def signature(self, task: Any, *args: Any, **kwargs: Any) -> Any:
        """A signature that belongs to it."""

    @property
    def calls(self) -> ComposesMessages:
        """Composes messages."""

    @property
    def workflows(self) -> ComposesWorkflows:
        """Composes chains, groups and callbacks."""

    def freeze(self, sig: Any, *, task_id: str | None, **place: Any) -> Any:
        """Fix the ids of a signature and of its parts, in place; the result it will have."""

    def group_result(self, group_id: str, results: Sequence[object], parent: object = None) -> GroupResult:
        """The results of a group."""

    def AsyncResult(self, task_id: str, *, task_name: str | None = None) -> UntypedResult:
        """The result of an earlier call, by its id."""

    def store_state(self, result: ResultMessage, context: Context) -> None:
        """Store a state now. Raises: BackendNotConfigured."""
