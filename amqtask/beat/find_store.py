"""From `beat_scheduler` or `-S` to the store of entries: a short name, `module:Class`, or Celery's names for them."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from amqtask.beat.contract import KeepsTime
from amqtask.exceptions import ConfigurationError
from amqtask.ground.imports import load_path

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.beat.contract import ScheduleStore, StoreOptions

GROUP = "amqtask.schedule_stores"
DEFAULT = "file"
# What configurations written for Celery say.
_CELERYS = {
    "celery.beat.PersistentScheduler": "file",
    "celery.beat.Scheduler": "memory",
    "django_celery_beat.schedulers.DatabaseScheduler": "django",
}

StoreFactory = Callable[["AmqTask", "StoreOptions"], "ScheduleStore"]


def short_name(spec: str | None) -> str:
    """The name of a store, Celery's own names translated."""
    name = spec or DEFAULT
    return _CELERYS.get(name.replace(":", "."), name)


def find_store(spec: str | None) -> StoreFactory | KeepsTime:
    """The store of that name (a StoreFactory), or a class that keeps time itself (KeepsTime).

    Raises: ConfigurationError saying what there is.
    """
    name = short_name(spec)
    library_scheduler = _of_library(spec or "") if name == "django" else None
    if library_scheduler is not None:
        return library_scheduler
    points = {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}
    try:
        if name in points:
            store: Any = points[name].load()
        elif ":" in name or "." in name:
            store = load_path(name)
        else:
            names = ", ".join(sorted(points))
            raise ConfigurationError(f"no schedule store {name!r}: there are {names}; or say module:Class")
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"the schedule store {spec!r} cannot be loaded: {error}") from error
    if not isinstance(store, KeepsTime) and not (hasattr(store, "entries") and hasattr(store, "record")):
        raise ConfigurationError(
            f"{spec!r} is not a schedule store (amqtask.beat.contract.ScheduleStore): it has no entries() and record(). A "
            "scheduler class written for Celery must derive from amqtask.beat.Scheduler in place of celery.beat.Scheduler."
        )
    factory: StoreFactory | KeepsTime = store
    return factory


def _of_library(path: str) -> KeepsTime | None:
    """django-celery-beat's own scheduler, where its tables are this project's, ours are not, and it derives from amqtask.beat."""
    if "django_celery_beat.models" not in sys.modules or "amqtask.contrib.django.models" in sys.modules:
        return None
    scheduler = load_path(
        path if path.startswith("django_celery_beat") else "django_celery_beat.schedulers:DatabaseScheduler"
    )
    return scheduler if isinstance(scheduler, KeepsTime) else None
