"""What `pip install "amqtask[…]"` knows, and what the lock file for development has of it."""

from __future__ import annotations

import re
from importlib.metadata import metadata, requires
from pathlib import Path

from packaging.requirements import Requirement

LOCK = Path(__file__).parent.parent / "requirements-dev.lock"


def test_a_line_written_for_celery_installs() -> None:
    extras = metadata("amqtask").get_all("Provides-Extra") or []

    assert {"librabbitmq", "redis", "auth", "msgpack", "eventlet", "gevent"} <= set(extras)


def test_the_lock_has_a_version_that_fits_each_requirement() -> None:
    locked: dict[str, list[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==([\w.]+)", LOCK.read_text(), re.MULTILINE):
        locked.setdefault(name, []).append(version)

    wanted = [Requirement(line) for line in requires("amqtask") or ()]
    unmet = [
        str(one)
        for one in wanted
        if one.name != "amqtask"
        and not any(one.specifier.contains(version) for version in locked.get(normal(one.name), ()))
    ]
    assert len(wanted) > 50
    assert unmet == []


def normal(name: str) -> str:
    """As indexes write names."""
    return re.sub(r"[-_.]+", "-", name).lower()
