"""Tasks and their surroundings for tests of executors and pools: no app, no broker, and all survives a fork."""

from __future__ import annotations

import _thread
import asyncio
import inspect
import json
import os
import sys
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amqtask.exceptions import EncodeError, Retry, SoftTimeLimitExceeded
from amqtask.execution.context import Context, current_context
from amqtask.execution.executor import Executor
from amqtask.execution.gated import BatchedExecutor
from amqtask.execution.request import Calls, Request
from amqtask.ground.plugins import load
from amqtask.protocol.flow_options import Batch
from amqtask.protocol.message import Message, Properties
from amqtask.protocol.result import ResultMessage, encode_result
from amqtask.protocol.serialization import content_types

if TYPE_CHECKING:
    from amqtask.execution.batches import BatchCall
    from amqtask.flow.keys import FlowPlan
    from amqtask.ground.shapes import JsonObject, KeywordDict, SignatureFields


class PlainTask:
    """A task as the executor sees it: a function and options under Task's names."""

    overridden_hooks: frozenset[str] = frozenset()

    def __init__(self, function: Callable[..., Any], name: str = "", **options: Any) -> None:
        self.name = name or function.__name__
        self.run = function
        self.is_async = inspect.iscoroutinefunction(function)
        self.ignore_result = False
        self.store_errors_even_if_ignored = False
        self.track_started = False
        self.acks_late = True
        self.acks_on_failure = True
        self.acks_on_timeout = True
        self.reject_on_worker_lost = True
        self.max_retries: int | None = 3
        self.default_retry_delay = 180.0
        self.throws: tuple[type[BaseException], ...] = ()
        self.autoretry_for: tuple[type[BaseException], ...] = ()
        self.dont_autoretry_for: tuple[type[BaseException], ...] = ()
        self.retry_kwargs: KeywordDict = {}
        self.retry_backoff = 0.0
        self.retry_backoff_max = 600.0
        self.retry_jitter = True
        self.soft_time_limit: float | None = None
        self.time_limit: float | None = None
        self.deadline: float | None = None
        self.flow_plan: FlowPlan | None = None
        self.inbox = False
        self.batch: Batch | None = None
        self.send_events = True
        self.__dict__.update(options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)

    def before_start(self, task_id: str, args: Any, kwargs: KeywordDict) -> None: ...

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: KeywordDict) -> None: ...

    def on_failure(self, exc: BaseException, task_id: str, args: Any, kwargs: KeywordDict, einfo: Any) -> None: ...

    def on_retry(self, exc: BaseException, task_id: str, args: Any, kwargs: KeywordDict, einfo: Any) -> None: ...

    def after_return(
        self, status: str, retval: Any, task_id: str, args: Any, kwargs: KeywordDict, einfo: Any
    ) -> None: ...

    def retry(self, *, exc: BaseException | None = None, countdown: float | None = None, **options: Any) -> Any:
        """Retry until `max_retries`, then the error itself."""
        context = current_context()
        retries = context.retries if context is not None else 0
        if self.max_retries is not None and retries >= self.max_retries and exc is not None:
            raise exc
        raise Retry(exc=exc, when=self.default_retry_delay if countdown is None else countdown)


class PlainComposer:
    """Follow-ups as messages that say what they are."""

    def compose_retry(self, request: Request, context: Context, *, when: object, sig: object) -> Message:
        """The routing key is `retry`."""
        return _message("retry", {"id": request.id, "retries": context.retries + 1, "when": when})

    def compose_next(
        self,
        signature: SignatureFields,
        result: object,
        context: Context,
        chain: list[SignatureFields],
        *,
        is_bound: bool = True,
    ) -> list[Message]:
        """The routing key is the next task's name."""
        return [_message(signature["task"], {"args": [result], "chain": chain})]

    def compose_body(
        self, body: SignatureFields, values: list[object], group_id: str, parent_id: str | None
    ) -> list[Message]:
        """The routing key is the body's name."""
        return [_message(body["task"], {"args": [values]})]

    def compose_replacement(self, replacement: Any, context: Context) -> list[Message]:
        """The routing key is the replacement's name."""
        return [_message(replacement["task"], {"id": context.id})]

    def compose_errback(self, errback: SignatureFields, context: Context, error: BaseException, trace: str) -> Message:
        """The routing key is the errback's name."""
        return _message(errback["task"], {"of": context.id, "error": repr(error)})


class AmqpStore:
    """A result store like `rpc://`: results are messages."""

    blocks = keeps_runs = stores_together = False

    def message_for(self, result: ResultMessage, reply_to: str | None, correlation_id: str | None) -> Message | None:
        """Raises: EncodeError."""
        body, content_type, encoding = encode_result(result, "json")
        properties = Properties(content_type=content_type, content_encoding=encoding, correlation_id=correlation_id)
        return Message(body, properties, routing_key=reply_to or "replies")

    def store(self, result: ResultMessage) -> None:
        """Do nothing: results are messages."""

    store_briefly = store


def _message(routing_key: str, value: object) -> Message:
    try:
        return Message(json.dumps(value).encode(), Properties(content_type="application/json"), routing_key=routing_key)
    except TypeError as error:
        raise EncodeError(str(error)) from error


def request(number: int, task: str, *args: object, embed: JsonObject | None = None, **options: Any) -> Request:
    """A request as the worker makes them; `options` are Request's."""
    headers = {"task": task, "id": f"id-{number}", "retries": 0, **options.pop("headers", {})}
    body = options.pop("body", None)
    if body is None:
        body = json.dumps([args, {}, embed or {}]).encode()
    return Request(number=number, id=f"id-{number}", task=task, headers=headers, body=body, **options)


def batch_request(number: int, task: str, *calls: Sequence[object], **options: Any) -> Request:
    """The request of a batch as the worker makes them: of one call for each of these arguments, numbered from `number` on."""
    batch = Request(number=-number, id="", task=task, **options)
    requests = Calls(request(number + index, task, *args) for index, args in enumerate(calls))
    batch.decoded = requests  # type: ignore[assignment] # see Request
    return batch


def make_executor(*tasks: PlainTask, **options: Any) -> Executor:
    """An executor of these tasks; `options` are Executor's."""
    options.setdefault("store", AmqpStore())
    make = Executor if all(task.batch is None for task in tasks) else BatchedExecutor
    return make(
        {task.name: task for task in tasks},
        accept=content_types(["json"]),
        composer=PlainComposer(),
        hostname="tests@here",
        **options,
    )


_LOCK = threading.Lock()

# -- tasks that do what tests of pools need; they tell each other things through files, so processes will do


def add(x: int, y: int) -> int:
    """The sum of two numbers."""
    return x + y


async def add_async(x: int, y: int) -> int:
    """`add` as a coroutine that waits."""
    await asyncio.sleep(0.001)
    return x + y


def fail(text: str) -> None:
    """Raise an ordinary error."""
    raise ValueError(text)


def leave_the_process() -> None:
    """Call sys.exit, as some libraries do."""
    sys.exit(3)


def try_again() -> None:
    """Ask for a retry."""
    raise Retry(exc=ValueError("not yet"), when=1.5)


def _looks(folder: str, name: str, until: str, seconds: float) -> Iterator[None]:
    """Say that it runs, and look until a file appears; whoever asks for the next look waits meanwhile."""
    directory = Path(folder)
    (directory / f"{name}.started").touch()
    deadline = time.monotonic() + seconds
    while not (directory / until).exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{until} did not appear")
        yield
    (directory / f"{name}.ended").touch()


def wait_for(folder: str, name: str, until: str, seconds: float = 60.0) -> str:
    """Say that it runs, then wait until a file appears."""
    for _ in _looks(folder, name, until, seconds):
        time.sleep(0.005)
    return name


async def stop_the_loop() -> str:
    """Stop the event loop that it runs on, which may be others', too."""
    asyncio.get_running_loop().stop()
    await asyncio.sleep(0.01)
    return "went on"


def leave_a_thread_that_exits() -> str:
    """Leave a thread, green where threads are, that ends the program. (threading.Thread keeps a SystemExit to itself.)"""
    _thread.start_new_thread(sys.exit, (3,))
    time.sleep(0.05)
    return "went on"


async def leave_an_exit() -> str:
    """Leave a coroutine on the loop that ends the program."""

    async def leave() -> None:
        raise SystemExit("the program")

    left = asyncio.get_running_loop().create_task(leave())
    await asyncio.sleep(0.01)
    return f"went on without {left.exception()!r}"


async def wait_for_async(folder: str, name: str, until: str, seconds: float = 60.0) -> str:
    """`wait_for` as a coroutine."""
    for _ in _looks(folder, name, until, seconds):
        await asyncio.sleep(0.005)
    return name


def clean_up(folder: str) -> str:
    """Waits, and handles its soft limit."""
    try:
        wait_for(folder, "cleaner", "never")
    except SoftTimeLimitExceeded:
        return "cleaned up"
    return "not limited"


async def clean_up_async(folder: str) -> str:
    """`clean_up` as a coroutine."""
    try:
        await wait_for_async(folder, "cleaner", "never")
    except SoftTimeLimitExceeded:
        await asyncio.sleep(0)
        return "cleaned up"
    return "not limited"


async def clean_up_beside_async(folder: str) -> str:
    """`clean_up_async` while other tasks of its loop are at work, which is when a limit mostly strikes."""

    async def work() -> None:
        while True:
            sum(range(20_000))
            await asyncio.sleep(0)

    busy_tasks = [asyncio.create_task(work()) for _ in range(3)]
    try:
        return await clean_up_async(folder)
    finally:
        for busy_task in busy_tasks:
            busy_task.cancel()


def who_am_i(folder: str, name: str, until: str) -> list[Any]:
    """The id in `task.request` before and after it waited."""
    before = current_context()
    wait_for(folder, name, until)
    after = current_context()
    return [before and before.id, after and after.id, os.getpid()]


def share_a_lock(turns: int) -> int:
    """Holds a lock that others want, and waits meanwhile."""
    for _ in range(turns):
        with _LOCK:
            time.sleep(0.001)
    return turns


async def share_a_lock_async(turns: int) -> int:
    """The same lock in a coroutine, as a logger or a connection pool takes it."""
    for _ in range(turns):
        await asyncio.sleep(0.001)
        with _LOCK:
            pass
    return turns


def run_a_loop(turns: int) -> int:
    """Has an event loop of its own, as a library with a synchronous face does."""
    return sum(asyncio.run(_ones(turns)) for _ in range(3)) // 3


async def _ones(turns: int) -> int:
    async def each() -> AsyncIterator[int]:
        for _ in range(turns):
            await asyncio.sleep(0.001)
            yield 1

    return sum([one async for one in each()])


async def use_asyncio(text: str) -> list[str]:
    """Connections, threads, processes, generators and time limits of asyncio."""

    async def shout(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.readline()).upper())
        writer.close()

    server = await asyncio.start_server(shout, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(text.encode() + b"\n")
    answer = (await reader.read()).decode().strip()
    writer.close()
    server.close()
    in_thread = await asyncio.gather(*(asyncio.to_thread(text.title) for _ in range(3)))
    echo = await asyncio.create_subprocess_exec("echo", text, stdout=asyncio.subprocess.PIPE)
    printed, _ = await echo.communicate()
    try:
        await asyncio.wait_for(asyncio.sleep(30), 0.01)
    except (asyncio.TimeoutError, TimeoutError):
        return [answer, *in_thread, printed.decode().strip(), str(await _ones(3))]
    raise AssertionError("wait_for did not end a long sleep")


VARIABLE: ContextVar[str] = ContextVar("amqtask_testing_variable", default="not set")


def set_a_context_variable() -> str:
    """Set a context variable; returns its value before."""
    before = VARIABLE.get()
    VARIABLE.set("set")
    return before


async def set_a_context_variable_async() -> str:
    """`set_a_context_variable` as a coroutine."""
    return set_a_context_variable()


def fork_and_return(how: str) -> int:
    """Fork, and let the child run out of the task; its exit code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads: the child does nothing but end
        child = os.fork()
    if child == 0:
        if how == "raise":
            raise ValueError("in the forked process")
        if how == "exit":
            sys.exit(3)
        return 0
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def leave_a_timeout(library: str, seconds: float) -> None:
    """Leave a timeout of eventlet's or gevent's running."""
    timeout = load(library).Timeout(seconds)  # eventlet's has begun
    if library == "gevent":
        timeout.start()


def add_each(calls: list[BatchCall]) -> list[Any]:
    """The sum of each call's arguments."""
    return [sum(call.args) for call in calls]


async def add_each_async(calls: list[BatchCall]) -> list[Any]:
    """`add_each` as a coroutine that waits."""
    await asyncio.sleep(0.001)
    return add_each(calls)


def end_each(calls: list[BatchCall]) -> None:
    """Each call says how it ends; an empty word ends nothing, and `raise` ends all of which nothing was said."""
    for call in calls:
        match call.args[0]:
            case "succeed":
                call.succeed(call.id)
            case "fail":
                call.fail(ValueError("as told"))
            case "retry":
                call.retry(ValueError("not yet"), countdown=1.5)
    if any(call.args[0] == "raise" for call in calls):
        raise KeyError("all others")


def wait_for_each(calls: list[BatchCall]) -> list[str]:
    """`wait_for` once, with the arguments of the first call."""
    calls[-1].succeed("said before")
    return [wait_for(*calls[0].args)] * len(calls)


async def wait_for_each_async(calls: list[BatchCall]) -> list[str]:
    """`wait_for_each` as a coroutine."""
    calls[-1].succeed("said before")
    return [await wait_for_async(*calls[0].args)] * len(calls)


BATCH_TASKS = tuple(
    PlainTask(function, batch=Batch())
    for function in (add_each, add_each_async, end_each, wait_for_each, wait_for_each_async)
)
POOL_TASKS = BATCH_TASKS + tuple(
    PlainTask(function)
    for function in (
        add, add_async, fail, leave_the_process, try_again, wait_for, wait_for_async, clean_up, clean_up_async,
        clean_up_beside_async, who_am_i, share_a_lock, share_a_lock_async, run_a_loop, use_asyncio,
        set_a_context_variable, set_a_context_variable_async, fork_and_return, leave_a_timeout,
        stop_the_loop, leave_an_exit, leave_a_thread_that_exits,
    )
)  # fmt: skip
