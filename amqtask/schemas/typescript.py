"""A producer in TypeScript, over amqplib: the tasks as types, and one method that takes nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amqtask.ground.shapes import JsonObject
    from amqtask.schemas import Contracts, TaskContract

REFS = "#/$defs/"
_IDENTIFIER = re.compile(r"[A-Za-z_$][\w$]*\Z")
_PLAIN = {"string": "string", "integer": "number", "number": "number", "boolean": "boolean", "null": "null"}
_TEMPLATE = Path(__file__).with_name("producer.ts")


def producer(title: str, contracts: Contracts) -> str:
    """The text of a module. The schemas must have been read with REFS."""
    names = {name: _type_name(name) for name in contracts.definitions}
    parts = [f"// The tasks of {_comment(title)}. Made by `amqtask schema --typescript`: not to be edited."]
    parts.append(_TEMPLATE.read_text().rstrip())
    for name, schema in contracts.definitions.items():
        parts.append(f"export type {names[name]} = {_Types(names).of(schema)};")
    parts.append(_tasks(contracts, names))
    parts.append(_places(contracts))
    return "\n\n".join(parts) + "\n"


def _tasks(contracts: Contracts, names: dict[str, str]) -> str:
    types = _Types(names)
    lines = ["/** What each task takes and returns. */", "export interface Tasks {"]
    for task in contracts.tasks:
        if task.description:
            lines.append(f"  /** {_comment(task.description)} */")
        lines.append(f"  {json.dumps(task.name)}: {{")
        lines.append(f"    arguments: {types.of(task.arguments_schema)};")
        if task.rest is not None:
            lines.append(f"    rest: {types.list_of(task.rest)};")
        lines.append(f"    result: {types.of(task.result)};")
        lines.append("  };")
    return "\n".join([*lines, "}"])


def _places(contracts: Contracts) -> str:
    places = {task.name: _place(task) for task in contracts.tasks}
    return f"const places: Record<keyof Tasks, Place> = {json.dumps(places, indent=2)};"


def _place(task: TaskContract) -> JsonObject:
    route = task.route
    place: JsonObject = {"positional": [argument.name for argument in task.positional]}
    if route is not None:
        place |= {"exchange": route.exchange, "routingKey": route.routing_key}
    return place


def _type_name(name: str) -> str:
    identifier = re.sub(r"\W", "_", name)
    return f"_{identifier}" if identifier[:1].isdigit() or identifier in _TAKEN else identifier


# What the module has already.
_TAKEN = frozenset({"Tasks", "Producer", "Place", "CallOptions", "Unroutable", "TaskName"})


def _comment(text: str) -> str:
    return " ".join(text.split()).replace("*/", "* /")


class _Types:
    """JSON Schema as types of TypeScript: as narrow as they can say it, `unknown` else."""

    def __init__(self, names: dict[str, str]) -> None:
        self._names = names

    def of(self, schema: Any) -> str:
        """One schema."""
        if not isinstance(schema, dict):
            return "unknown" if schema else "never"
        if "$ref" in schema:
            return self._names.get(str(schema["$ref"]).removeprefix(REFS), "unknown")
        if "const" in schema:
            return json.dumps(schema["const"])
        if "enum" in schema:
            return " | ".join(map(json.dumps, schema["enum"]))
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                return self._union(schema[keyword])
        if "allOf" in schema:
            return " & ".join(self.of(part) for part in schema["allOf"])
        schema_type = schema.get("type")
        if isinstance(schema_type, list):
            return self._union([{**schema, "type": name} for name in schema_type])
        if schema_type == "array":
            return self._array(schema)
        if schema_type == "object":
            return self._object(schema)
        return _PLAIN.get(str(schema_type), "unknown")

    def list_of(self, schema: Any) -> str:
        """A list of what this schema says."""
        element = self.of(schema)
        return f"{element}[]" if _IDENTIFIER.match(element) else f"({element})[]"

    def _union(self, parts: list[Any]) -> str:
        return " | ".join(dict.fromkeys(self.of(part) for part in parts))

    def _array(self, schema: JsonObject) -> str:
        if "prefixItems" not in schema:
            return self.list_of(schema.get("items", True))
        items = [self.of(item) for item in schema["prefixItems"]]
        if "maxItems" not in schema and schema.get("items") is not False:
            items.append(f"...{self.list_of(schema.get('items', True))}")
        return f"[{', '.join(items)}]"

    def _object(self, schema: JsonObject) -> str:
        required = set(schema.get("required", ()))
        fields = [
            f"{name if _IDENTIFIER.match(name) else json.dumps(name)}{'' if name in required else '?'}: {self.of(part)}"
            for name, part in schema.get("properties", {}).items()
        ]
        additional = schema.get("additionalProperties", "properties" not in schema)
        if not fields:
            return "Record<string, never>" if additional is False else f"Record<string, {self.of(additional)}>"
        written = f"{{ {'; '.join(fields)} }}"
        # An index of a narrower type would have to fit the fields as well.
        return f"{written} & Record<string, unknown>" if isinstance(additional, dict) else written
