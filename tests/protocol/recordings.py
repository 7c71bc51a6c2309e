"""The messages of tests/data/celery, as they lay in the queue."""

from __future__ import annotations

import base64
import json
import uuid
from datetime import date, datetime, time, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent.parent / "data" / "celery"

# What recorded.py sent and returned.
VALUES: dict[str, Any] = {
    "datetime": datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=timezone.utc),
    "naive": datetime(2026, 1, 2, 3, 4, 5),
    "date": date(2026, 1, 2),
    "time": time(3, 4, 5),
    "decimal": Decimal("1.10"),
    "uuid": uuid.UUID(int=7),
    "text": b"bytes",
    "binary": b"\xff\x00",
    "nested": [{"deep": (1, "ü")}],
}


class Recorded(NamedTuple):
    """One message. Results in Redis have neither properties nor headers."""

    name: str
    properties: dict[str, Any]
    headers: dict[str, Any]
    body: bytes


def names(kind: str) -> list[str]:
    return sorted(path.stem.removeprefix(f"{kind}_") for path in FOLDER.glob(f"{kind}_*.json"))


def recorded(kind: str, name: str) -> list[Recorded]:
    content = json.loads((FOLDER / f"{kind}_{name}.json").read_text(encoding="utf-8"))
    return [
        Recorded(name, found.get("properties", {}), found.get("headers", {}), base64.b64decode(found["body"]))
        for found in content.get("messages", [content])
    ]


def one(kind: str, name: str) -> Recorded:
    (found,) = recorded(kind, name)
    return found


def listed(value: Any) -> Any:
    """The value as JSON would have it: tuples are lists."""
    if isinstance(value, (list, tuple)):
        return [listed(item) for item in value]
    if isinstance(value, dict):
        return {key: listed(item) for key, item in value.items()}
    return value
