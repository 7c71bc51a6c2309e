"""Inspect: what workers can be asked, by Celery's names (celery/app/control.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from amqtask.ground.shapes import CommandArguments, Replies

MATCHERS = ("glob", "pcre")


@dataclass(frozen=True, slots=True, kw_only=True)
class AskOptions:
    """Which nodes are asked (None: all), and how long answers are waited for. `matcher` is glob or pcre, `timeout` seconds."""

    destination: str | Sequence[str] | None = None
    timeout: float = 1.0
    limit: int | None = None
    pattern: str | None = None
    matcher: str | None = None
    callback: Callable[[dict[str, Any]], object] | None = None


class Asker(Protocol):
    """Sends a question and returns the answers by node."""

    def ask_them(self, question: str, arguments: CommandArguments, options: AskOptions) -> Replies: ...


class Inspect:
    """Each question returns {node: answer}, or None when nobody answered (as in Celery)."""

    def __init__(self, asker: Asker, options: AskOptions) -> None:
        self._asker = asker
        self._options = options

    def _request(self, command: str, **arguments: object) -> Replies | None:
        """Any question, a custom one too, under Celery's name for this method."""
        return self._asker.ask_them(command, arguments, self._options) or None

    def ping(self, destination: Sequence[str] | None = None) -> Replies | None:
        """Who is there: {"ok": "pong"}."""
        if not destination:
            return self._request("ping")
        old = self._options
        options = AskOptions(destination=destination, timeout=old.timeout, callback=old.callback)
        return self._asker.ask_them("ping", {}, options) or None

    def active(self, safe: bool | None = None) -> Replies | None:
        """What runs; with `safe` arguments are told as text and nothing is decoded for it."""
        return self._request("active", safe=safe)

    def reserved(self, safe: bool | None = None) -> Replies | None:
        """What was delivered and waits for a slot."""
        return self._request("reserved", safe=safe)

    def scheduled(self, safe: bool | None = None) -> Replies | None:
        """What waits in workers for its time: nearly nothing here, delays are the broker's."""
        return self._request("scheduled", safe=safe)

    def revoked(self) -> Replies | None:
        """Ids of revoked tasks."""
        return self._request("revoked")

    def registered(self, *taskinfoitems: str) -> Replies | None:
        """Tasks that workers know, with these attributes (exchange, routing_key and rate_limit if none is named)."""
        return self._request("registered", taskinfoitems=list(taskinfoitems))

    registered_tasks = registered

    def stats(self) -> Replies | None:
        """Statistics of workers."""
        return self._request("stats")

    def active_queues(self) -> Replies | None:
        """What workers consume."""
        return self._request("active_queues")

    def conf(self, with_defaults: bool = False) -> Replies | None:
        """Settings, secrets starred out."""
        return self._request("conf", with_defaults=with_defaults)

    def query_task(self, *ids: str | Sequence[str]) -> Replies | None:
        """What workers know of tasks: {node: {id: [state, info]}}; ids one by one, or one list."""
        task_ids = ids[0] if len(ids) == 1 and isinstance(ids[0], (list, tuple)) else ids
        return self._request("query_task", ids=list(task_ids))

    def clock(self) -> Replies | None:
        """Logical clocks of workers."""
        return self._request("clock")

    def report(self) -> Replies | None:
        """Versions and settings, as {"ok": text}."""
        return self._request("report")

    def hello(self, from_node: str, revoked: Sequence[str] | None = None) -> Replies | None:
        """What a worker that starts asks: the others' revoked ids, and it tells its own."""
        return self._request("hello", from_node=from_node, revoked=revoked)

    def memsample(self) -> Replies | None:
        """Memory that workers' main processes have in use, in words; kept for `memdump`."""
        return self._request("memsample")

    def memdump(self, samples: int = 10) -> Replies | None:
        """What earlier memsamples said, as text."""
        return self._request("memdump", samples=samples)

    def objgraph(self, type: str = "Request", n: int = 200, max_depth: int = 10) -> Replies | None:
        """Draw what refers to objects of a type: {"filename": …} on the worker's machine; needs objgraph there."""
        return self._request("objgraph", num=n, max_depth=max_depth, type=type)
