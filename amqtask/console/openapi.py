"""The console's JSON API as an OpenAPI document (https://spec.openapis.org/oas/v3.1.1.html), at /api/openapi.json.

What is described here is what tests hold each answer to, to the last field.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from datetime import datetime
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any

from amqtask.ground import VERSION
from amqtask.history.client import FailureGroup, PastTask, PastWorker
from amqtask.services.delayed import DelayedTask

if TYPE_CHECKING:
    from amqtask.ground.shapes import JsonObject

_TYPES: dict[object, str] = {
    str: "string", int: "integer", float: "number", bool: "boolean", NoneType: "null", object: "",
}  # fmt: skip


def schema_of(annotation: Any) -> JsonObject:
    """The JSON Schema of a type, as the console writes it. Of what it does not know: anything."""
    if is_dataclass(annotation):
        hints = typing.get_type_hints(annotation)
        # A task's message is nobody's to see.
        visible = [one for one in fields(annotation) if one.name != "message"]
        return {
            "type": "object",
            "properties": {one.name: schema_of(hints[one.name]) for one in visible},
            "required": [one.name for one in visible if one.default is MISSING],
        }
    if annotation is datetime:
        return {"type": "string", "format": "date-time"}
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, UnionType):
        return {"anyOf": [schema_of(one) for one in inner]}
    if origin in (list, tuple, Sequence):
        return {"type": "array", "items": schema_of(inner[0])}
    if origin in (dict, Mapping):
        return {"type": "object", "additionalProperties": schema_of(inner[1])}
    return {"type": _TYPES[annotation]} if _TYPES.get(annotation) else {}


def _of(optional: Mapping[str, Any] | None = None, /, **properties: Any) -> JsonObject:
    """An object that has all of these properties, and perhaps those that are `optional`."""
    shown = {
        name: one if isinstance(one, dict) else schema_of(one)
        for name, one in {**properties, **(optional or {})}.items()
    }
    return {"type": "object", "properties": shown, "required": list(properties)}


def _list(items: Any) -> JsonObject:
    return {"type": "array", "items": items if isinstance(items, dict) else schema_of(items)}


def _ref(name: str) -> JsonObject:
    return {"$ref": f"#/components/schemas/{name}"}


_Text, _Number = str | None, int | None
_GROUP = schema_of(FailureGroup)
SCHEMAS: dict[str, JsonObject] = {
    "Task": schema_of(PastTask),
    "FailureGroup": _GROUP | {"properties": {**_GROUP["properties"], "example": _ref("Task")}},
    "KnownWorker": schema_of(PastWorker),
    "DelayedTask": schema_of(DelayedTask),
    "Pause": _of(by=str, since=float | str),
    "Queue": _of(queue=str, ready=_Number, consumers=_Number, dead=_Number, paused={"anyOf": [_ref("Pause"), {"type": "null"}]}),
    "DeadLetter": _of(id=_Text, task=_Text, queue=str, reason=str, exception=object, attempts=object, host=object, died_at=_Text),
    "Worker": _of(
        {"last_heard": datetime},
        worker=str, state={"enum": ["there", "silent", "gone"]}, is_celery=bool, pool=_Text,
        scales=dict[str, int] | None, slots=object, running=_Number, done=_Number,
        prefetch=object, up=object, pid=object, queues=_list({}), paused=_list({}), tasks=_list({"type": "object"}),
    ),
    "Line": {"anyOf": [_ref(name) for name in ("TaskLine", "GroupLine", "ExpectedLine", "HiddenLine")]},
    "TaskLine": _of(
        kind={"const": "task"}, depth=int, is_next=bool, id=str, task=_Text, state=str, waits_for=_Text, error=_Text,
        first=datetime, ended=datetime | None, runtime=float | None, worker=_Text, queue=_Text, group=_Text, index=_Number,
    ),
    "GroupLine": _of(
        kind={"const": "group"}, depth=int, is_next=bool, id=str, is_chord=bool, count=int, size=_Number, states=dict[str, int],
    ),
    "ExpectedLine": _of(
        kind={"const": "expected"}, depth=int, is_next=bool, how=str, task=_Text, id=_Text, members=_Number, waits_for=str,
    ),
    "HiddenLine": _of(kind={"const": "hidden"}, depth=int, is_next=bool, count=int),
    "Schedule": _of(
        name=str, task=str, call=str, schedule=str, enabled=bool, one_off=bool,
        paused={"anyOf": [_ref("Pause"), {"type": "null"}]}, last_run_at=datetime | None, next_due_at=datetime | None,
        total_run_count=int, runs=_list(_of(id=str, state=str, at=datetime, runtime=float | None)),
    ),
    "Limit": _of(
        task=str, limit=str, value=str, in_code=str, running=int, waiting=int, by=_Text, since=datetime | None,
        keys=_list(_of(key=str, running=int, waiting=int)),
    ),
    "Rule": _of(name=str, about=str, above=float, hold=float, of=dict[str, float]),
    "Alert": _of(id=int, rule=str, subject=str, text=str, began_at=float, ended_at=float | None),
    "Action": _of(id=int, at=float, who=str, action=str, subject=str, outcome=_Text),
    "Done": _of(done=str),
    "Error": _of(error=str),
}  # fmt: skip
_SEARCH = {
    "state": "The state", "task": "The task's name", "queue": "Its queue", "worker": "The worker that had it last",
    "error": "The class of its exception", "text": "Words in its arguments or its error; addr* for all that begin so",
    "stamp": "name=value", "root_id": "The root of its workflow",
    "since": "First heard of since then: 10m, 2h, 7d ago, or a time in ISO 8601", "until": "First heard of before that",
}  # fmt: skip
# path → (what it is, parameters of the query, what it answers)
PAGES: dict[str, tuple[str, dict[str, str], JsonObject]] = {
    "/": (
        "What happened in the last hours",
        {"hours": "How many, 1 to 168; default 1"},
        _of(
            hours=int, sent=int, succeeded=int, failed=int, retried=int, runtime=float | None,
            waited=float | None,
            plot=_list(_of(at=datetime, succeeded=int, failed=int, runtime=float | None, waited=float | None)),
            alerts=_list(_ref("Alert")),
            queues=_list(_of(queue=str, ready=int, growth=_Number, waits=float | None)),
            breakers=_list(_of(task=str, state=str, seconds=float)),
            failures=_list(_ref("FailureGroup")),
            workers=_list(_ref("KnownWorker")),
        ),
    ),
    "/tasks": (
        "The newest tasks that fit, 50 at a time",
        {**_SEARCH, "after": "`next` of the page before", "whole": "yes: look through all, also where that takes seconds"},
        _of(query={"type": "object"}, tasks=_list(_ref("Task")), next=_Text, looked_to=datetime | None),
    ),
    "/tasks/{task_id}": (
        "One task and its family",
        {},
        _of(
            task=_ref("Task"), editable=dict[str, str], is_in_workflow=bool,
            **{name: _list(_ref("Task")) for name in ("parents", "children", "reruns")},
        ),
    ),
    "/many/{action}": (
        "How many tasks fit a search and would `rerun` or `revoke`: with `more` of the newest 10,001, and older ones fit, too; "
        "with `looked_to` of those that came since then, which are found soon, and older ones may fit. "
        "`fields` are for /api/do/rerun-all or revoke-all",
        _SEARCH,
        _of(
            action={"enum": ["rerun", "revoke"]}, number=int, more=bool, looked_to=datetime | None, of=dict[str, int],
            left_alone=int, fields=dict[str, str], title=str,
        ),
    ),
    "/failures": (
        "Failures in groups of task and exception",
        {"since": "10m, 2h, 1d (the default) ago, or a time in ISO 8601"},
        _of(since=str, groups=_list(_ref("FailureGroup"))),
    ),
    "/dead": (
        "Dead letters: how many, in groups, and the first of each queue",
        {},
        _of(
            queues=dict[str, int], messages=_list(_ref("DeadLetter")),
            groups=_list(_of(queue=str, task=_Text, reason=str, count=int)), most=int,
        ),
    ),
    "/queues": (
        "The application's queues",
        {},
        _of(queues=_list(_ref("Queue")), paused_elsewhere=_list(_of(queue=str, by=str, since=float))),
    ),
    "/queues/delayed": (
        "Delayed tasks, the soonest first, 100 at a time. On RabbitMQ a look counts each as delivered once more",
        {"id": "Only this one", "task": "Only of this task", "queue": "Only for this queue", "page": "From 1"},
        _of(
            query={"type": "object"}, tasks=_list(_ref("DelayedTask")), number=int, total=int, is_part=bool, page=int, pages=int,
            most=int, most_of_a_queue=int,
        ),
    ),
    "/workflows/{some_id}": (
        "The workflow of a root id, or of any task or group: lines from the top, what is to come too",
        {},
        _of(id=str, root_id=str, name=_Text, count=int, more=bool, states_of=dict[str, int], lines=_list(_ref("Line"))),
    ),
    "/schedules": (
        "Periodic tasks, and what will be sent within 24 hours",
        {},
        _of(
            {"is_cut": bool}, source=str, zone=str, problem=_Text, entries=_list(_ref("Schedule")),
            ahead=_list(_of({"goes_on": bool}, due_at=datetime, name=str, task=str)),
        ),
    ),
    "/limits": ("Limits over all workers", {}, _of(limits=_list(_ref("Limit")), problem=_Text)),
    "/alerts": (
        "The rules, what fires, what fired, who is told, and what could not be told",
        {},
        _of(
            rules=_list(_ref("Rule")), destinations=_list(str), firing=_list(_ref("Alert")), past=_list(_ref("Alert")),
            untold=_list(
                _of(alert=int, destination=str, made_at=float, attempts=int, error=str, done_at=float | None)
            ),
        ),
    ),
    "/workers": ("What each worker is and runs", {}, _of(workers=_list(_ref("Worker")))),
    "/audit": ("What was done in the console, the newest first", {}, _of(actions=_list(_ref("Action")))),
}  # fmt: skip
# action → its fields; "?" are those that may be left out.
FIELDS: dict[str, str] = {
    "rerun": "id args? kwargs?", "rerun-group": "task error rate?", "revoke": "id terminate?", "cancel": "id terminate?",
    "rerun-all": "number? rate? *", "revoke-all": "number? terminate? *", "mark-seen": "task error last",
    "pause": "queue", "resume": "queue", "purge": "queue confirm",
    "retry-dead": "queue id? task? reason? all? rate?",
    "schedule-run": "name", "schedule-pause": "name", "schedule-resume": "name", "alert-test": "",
    "send-now": "id? task? queue? all?", "revoke-delayed": "id? task? queue? all?",
    "worker-grow": "worker n?", "worker-shrink": "worker n?", "worker-add-queue": "worker queue",
    "worker-remove-queue": "worker queue", "worker-drain": "worker", "worker-restart": "worker", "worker-shutdown": "worker",
    "rate-limit": "task limit? worker?",
    "limit-set": "task limit value burst?", "limit-reset": "task limit",
}  # fmt: skip


def document(pages: Iterable[str], actions: Mapping[str, Any], *, root: str = "") -> JsonObject:
    """The document for these pages and actions; `root` is where the console is mounted."""
    paths: JsonObject = {api_path(path): {"get": _look(path)} for path in pages}
    for name, action in actions.items():
        paths[f"/api/do/{name}"] = {"post": _action(name, getattr(action, "func", action).__doc__ or "")}
    return {
        "openapi": "3.1.0",
        "info": {"title": "amqtask console", "version": VERSION},
        "servers": [{"url": root or "/"}],
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {
                "basic": {"type": "http", "scheme": "basic", "description": "Where console_users are set"}
            },
        },
        "security": [{}, {"basic": []}],
    }


def api_path(path: str) -> str:
    """A page's address as JSON."""
    return "/api/overview" if path == "/" else f"/api{path}"


def _look(path: str) -> JsonObject:
    summary, query, answer = PAGES[path]
    parameters = [_parameter("path", name, "", required=True) for name in re.findall(r"{(\w+)}", path)]
    parameters += [_parameter("query", name, description) for name, description in query.items()]
    return {"summary": summary, "parameters": parameters, "responses": _responses(answer)}


def _parameter(place: str, name: str, description: str, *, required: bool = False) -> JsonObject:
    return {"in": place, "name": name, "description": description, "required": required, "schema": {"type": "string"}}


def _action(name: str, description: str) -> JsonObject:
    written = FIELDS.get(name)
    names = written.replace("*", " ".join(f"{field}?" for field in [*_SEARCH, "after"])).split() if written else []
    fields_schema = {
        "type": "object",
        "properties": {field.rstrip("?"): {"type": "string"} for field in names},
        "required": [field for field in names if not field.endswith("?")],
    }
    content = {
        content_type: {"schema": fields_schema}
        for content_type in ("application/json", "application/x-www-form-urlencoded")
    }
    return {
        "summary": " ".join(description.split()),
        "requestBody": {"required": True, "content": content},
        "responses": _responses(_ref("Done")),
    }


def _responses(answer: JsonObject) -> JsonObject:
    def told(text: str, schema: JsonObject) -> JsonObject:
        return {"description": text, "content": {"application/json": {"schema": schema}}}

    error = _ref("Error")
    return {
        "200": told("As asked", answer),
        "400": told("It did not work, and why", error),
        "401": told("Log in", error),
        "403": told("The user may not do that", error),
        "404": told("There is no such thing", error),
        "409": told("Somebody has just asked for the same", error),
        "413": told("It is too large", error),
        "503": told("The broker, or the index, is away or refuses", error),
    }
