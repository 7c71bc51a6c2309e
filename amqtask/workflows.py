"""Workflows: chains, groups and callbacks as the messages that carry them."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from amqtask.canvas import chain, from_dict, group
from amqtask.execution.context import Context
from amqtask.execution.request import Request
from amqtask.message import Message
from amqtask.result import AsyncResult
from amqtask.signature import Signature

if TYPE_CHECKING:
    from amqtask.app import AmqTask


class Workflows:
    """One app's; also what its executors compose follow-ups with (amqtask.execution.contract.Composer)."""

    def __init__(self, app: AmqTask) -> None:
        self._app = app

    def chained(self, found: Any) -> tuple[Signature, list[AsyncResult[Any]]]:
        """The first step, which carries the others (reversed, as on Celery's wire), and the results of all."""
        app = self._app
        options = dict(found.options)
        steps = [step.clone() for step in found.tasks]
        results: list[AsyncResult[Any]] = []
        reply_to = app.backend.reply_to() if app.backend is not None else None
        root_id = steps[0].options.setdefault("task_id", str(uuid.uuid4()))
        last = steps[-1]
        last.options["link"] = [*last.options.get("link", []), *options.pop("link", [])]
        errbacks = options.pop("link_error", [])
        if options.get("task_id"):
            last.options["task_id"] = options.pop("task_id")
        parent_id: str | None = None
        for step in steps:
            task_id = step.options.setdefault("task_id", str(uuid.uuid4()))
            step.options["root_id"] = root_id
            if parent_id is not None:
                step.options["parent_id"] = parent_id
            if reply_to:
                step.options["reply_to"] = reply_to
            if errbacks:
                step.options["link_error"] = [*step.options.get("link_error", []), *errbacks]
            if not step.options.get("link"):
                step.options.pop("link", None)
            result = AsyncResult[Any](
                task_id,
                app.backend,
                parent=results[-1] if results else None,
                revoke=app.revoke_call,
                task_name=step.task,
            )
            results.append(result)
            parent_id = task_id
        first = steps[0].set(**options)
        if len(steps) > 1:
            first.options["chain"] = [dict(step) for step in reversed(steps[1:])]
        return first, results

    def grouped(self, found: Any) -> tuple[str, list[Signature]]:
        """The group's id, and its members as calls that know it."""
        options = dict(found.options)
        group_id = options.pop("task_id", None) or str(uuid.uuid4())
        members = []
        for index, member in enumerate(found.tasks):
            if isinstance(member, (chain, group)) or member.task in ("celery.chain", "celery.group"):
                step, _ = self.chained(from_dict(member, self._app))
                member = step
            members.append(member.clone().set(**{**options, "group_id": group_id, "group_index": index}))
        return group_id, members

    def compose_retry(self, request: Request, context: Context, *, when: Any, sig: Any) -> Message:
        """The message of a retry."""
        return self._app.calls.compose_retry(request, context, when=when, sig=sig)

    def compose_next(
        self, signature: Mapping[str, Any], result: Any, context: Context, chain: list[Any]
    ) -> list[Message]:
        """The messages of a callback or of the next step of a chain."""
        found = from_dict(signature, self._app)
        calls = [found]
        if found.task == "celery.chain":
            first, _ = self.chained(found)
            calls = [first]
        elif found.task == "celery.group":
            _, calls = self.grouped(found)
        return [self._compose_step(call, result, context, chain) for call in calls]

    def _compose_step(self, call: Signature, result: Any, context: Context, chain: list[Any]) -> Message:
        tasks = self._app.tasks
        options = dict(call.options)
        if chain:
            options["chain"] = chain
        options.setdefault("root_id", context.root_id or context.id)
        options.setdefault("parent_id", context.id)
        args = call.args if call.immutable else (result, *call.args)
        request = context.request
        reply_to = options.pop("reply_to", None) or (request.reply_to if request is not None else None) or ""
        task = tasks.get(call.task) if call.task in tasks else None
        message = self._app.calls.compose(call.task, args, call.kwargs, options, task=task, reply_to=reply_to)
        context.children.append(((message.properties.headers["id"], None), None))
        return message
