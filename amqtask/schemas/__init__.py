"""TaskContract: what a task takes and returns, as JSON Schema, from its signature and type hints. pydantic knows the types."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from amqtask.exceptions import ConfigurationError
from amqtask.ground.plugins import load

if TYPE_CHECKING:
    from amqtask.ground.shapes import JsonObject
    from amqtask.task import Task
    from amqtask.topology.routes import Route

DIALECT = "https://json-schema.org/draft/2020-12/schema"
# For what has no type hint, or one without a schema.
ANYTHING: JsonObject = {}
Warn = Callable[[str], None]
_REST, _NAMED_REST = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD


@dataclass(frozen=True)
class Argument:
    """A parameter of a task. `schema` is JSON Schema."""

    name: str
    schema: JsonObject
    is_required: bool
    # Taken by its place only.
    is_positional: bool = False


@dataclass(frozen=True)
class TaskContract:
    """`rest` and `named_rest` are the schemas of *args and **kwargs; `route` is where a call without options goes, None when only
    a call's arguments tell."""

    name: str
    description: str
    arguments: tuple[Argument, ...]
    result: JsonObject
    route: Route | None = None
    rest: JsonObject | None = None
    named_rest: JsonObject | None = None

    @property
    def positional(self) -> list[Argument]:
        """The arguments that have no name in a message."""
        return [argument for argument in self.arguments if argument.is_positional]

    @property
    def args_schema(self) -> JsonObject:
        """The list of arguments by place, in a message."""
        positional = self.positional
        schema: JsonObject = {"type": "array", "items": False if self.rest is None else self.rest}
        if positional:
            schema["prefixItems"] = [argument.schema for argument in positional]
            schema["minItems"] = sum(argument.is_required for argument in positional)
        return schema

    @property
    def kwargs_schema(self) -> JsonObject:
        """The arguments by name, in a message."""
        return self._object(argument for argument in self.arguments if not argument.is_positional)

    @property
    def arguments_schema(self) -> JsonObject:
        """All arguments by name, those too that a message has by place."""
        return self._object(self.arguments)

    def _object(self, arguments: Iterable[Argument]) -> JsonObject:
        chosen = list(arguments)
        return {
            "type": "object",
            "properties": {argument.name: argument.schema for argument in chosen},
            "required": [argument.name for argument in chosen if argument.is_required],
            "additionalProperties": False if self.named_rest is None else self.named_rest,
        }


@dataclass
class Contracts:
    """The tasks of an application, and the types that several of them name (`$defs`)."""

    tasks: list[TaskContract] = field(default_factory=list)
    definitions: JsonObject = field(default_factory=dict)


def read_contracts(tasks: Sequence[tuple[Task[..., Any], Route | None]], *, refs: str, warn: Warn) -> Contracts:
    """The contracts of these tasks. `refs` is where their definitions will stand, such as `#/$defs/`; `warn` is told of each type
    that has no JSON Schema. Raises: ConfigurationError when pydantic is not installed."""
    reader = _Types(refs, warn)
    signatures = [(task, route, _signature(task), reader.hints(task)) for task, route in tasks]
    for task, _, signature, hints in signatures:
        for name in signature.parameters:
            reader.add(task.name, name, hints.get(name, inspect.Parameter.empty), "validation")
        reader.add(task.name, "return", hints.get("return", inspect.Parameter.empty), "serialization")
    schemas, definitions = reader.schemas()
    contracts = [
        _contract(task, route, signature, lambda name, task=task: schemas.get((task.name, name), ANYTHING))  # type: ignore[misc]
        for task, route, signature, _ in signatures
    ]
    return Contracts(sorted(contracts, key=lambda contract: contract.name), definitions)


def _signature(task: Task[..., Any]) -> inspect.Signature:
    anything = inspect.signature(lambda *args, **kwargs: None)
    if task.batch is not None:  # its function takes calls
        return anything
    try:
        return inspect.signature(task.run)
    except (TypeError, ValueError):  # of a built-in
        return anything


def _contract(
    task: Task[..., Any], route: Route | None, signature: inspect.Signature, schema_of: Callable[[str], JsonObject]
) -> TaskContract:
    arguments, rests = [], {}
    for parameter in signature.parameters.values():
        schema = schema_of(parameter.name)
        if parameter.kind in (_REST, _NAMED_REST):
            rests[parameter.kind] = schema
            continue
        has_default = parameter.default is not inspect.Parameter.empty
        if has_default and _is_json(parameter.default):
            schema = {**schema, "default": parameter.default}
        is_positional = parameter.kind is inspect.Parameter.POSITIONAL_ONLY
        arguments.append(Argument(parameter.name, schema, not has_default, is_positional))
    description = (
        inspect.cleandoc(task.__doc__) if task.__doc__ and task.__doc__ != type(task).__mro__[1].__doc__ else ""
    )
    return TaskContract(
        task.name, description, tuple(arguments), schema_of("return"), route, rests.get(_REST), rests.get(_NAMED_REST)
    )


def _is_json(value: object) -> bool:
    return value is None or type(value) in (bool, int, float, str)


class _Types:
    """Python's types as JSON Schema, all at once, so that types of one name get names that differ."""

    def __init__(self, refs: str, warn: Warn) -> None:
        try:
            self._pydantic: Any = load("pydantic")
            self._errors: Any = (load("pydantic.errors").PydanticUserError, load("pydantic_core").SchemaError)
        except ImportError as error:
            raise ConfigurationError("schemas need pydantic: pip install 'amqtask[pydantic]'") from error
        self._refs, self._warn = refs, warn
        self._adapters: list[tuple[tuple[str, str], str, Any]] = []

    def hints(self, task: Task[..., Any]) -> dict[str, Any]:
        """The annotations of a task's function; none where they name what is not there, or are not of one call."""
        if task.batch is not None:
            return {}
        function = inspect.unwrap(getattr(task.run, "__func__", task.run))
        try:
            return typing.get_type_hints(function, include_extras=True)
        except Exception as error:  # noqa: BLE001 - annotations are any code of the user's
            self._warn(f"{task.name}: its type hints cannot be read, so it takes anything: {error}")
            return {}

    def add(self, task: str, name: str, hint: object, mode: str) -> None:
        """One more type, of an argument or (`return`) a result."""
        if hint is inspect.Parameter.empty:
            return
        where = "its result" if name == "return" else f"its argument {name!r}"
        try:
            adapter = self._pydantic.TypeAdapter(hint)
            adapter.json_schema(mode=mode)
        except self._errors as error:
            self._warn(
                f"{task}: {where} is {hint!r}, which has no JSON Schema, so it may be anything: {str(error).splitlines()[0]}"
            )
        else:
            self._adapters.append(((task, name), mode, adapter))

    def schemas(self) -> tuple[dict[tuple[str, str], JsonObject], JsonObject]:
        """By task and name, and the definitions that they name."""
        if not self._adapters:
            return {}, {}
        by_parameter, whole = self._pydantic.TypeAdapter.json_schemas(
            self._adapters, ref_template=f"{self._refs}{{model}}"
        )
        return {key: _untitled(schema) for (key, _), schema in by_parameter.items()}, whole.get("$defs", {})


def _untitled(schema: JsonObject) -> JsonObject:
    return {key: value for key, value in schema.items() if key != "title" or "properties" in schema}


def json_schema(title: str, contracts: Contracts) -> JsonObject:
    """What may be called: an object with a property for each task, which has its `arguments` and its `result`."""
    properties = {}
    for task in contracts.tasks:
        properties[task.name] = {
            "type": "object",
            **({"description": task.description} if task.description else {}),
            "properties": {"arguments": task.arguments_schema, "result": task.result},
            "required": ["arguments"],
            "additionalProperties": False,
        }
    return {
        "$schema": DIALECT,
        "title": title,
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        **({"$defs": contracts.definitions} if contracts.definitions else {}),
    }
