"""Names that Celery's users import are at Celery's places, and do their job."""

from __future__ import annotations

import importlib
import json
import pickle
import re
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from amqtask import AmqTask
from amqtask.compat import MODULES, NAMES
from amqtask.testing.worker import start_worker

ROOT = Path(__file__).resolve().parent.parent.parent
# What Celery 5.7's API reference shows, and what public projects import: module → names.
REFERENCE: dict[str, list[str]] = json.loads((ROOT / "tests/data/celery/reference.json").read_text())
PAGE = (ROOT / "docs/coming-from-celery.md").read_text()
FATES = set(re.findall(r"`([\w.*]+)`", PAGE[PAGE.index("## Imports and names") : PAGE.index("## Sharing a queue")]))


def find(path: str) -> Any:
    """Module of that name, with `amqtask` for `celery`."""
    return importlib.import_module(f"amqtask.{path}" if path else "amqtask")


@pytest.mark.parametrize("module", sorted(REFERENCE))
def test_each_documented_name_is_there_or_has_its_fate_written_down(module: str) -> None:
    parents = [module.rsplit(".", count)[0] for count in range(module.count(".") + 1)]
    if any(f"{parent}.*" in FATES or parent in FATES for parent in parents):
        return
    found = find(module)

    missing = [name for name in REFERENCE[module] if not name.startswith("_") and not hasattr(found, name)]
    assert [name for name in missing if name not in FATES and f"{module}.{name}" not in FATES] == []


def test_most_documented_names_are_there() -> None:
    there = total = 0
    for module, names in REFERENCE.items():
        total += len(names)
        try:
            found = find(module)
        except ImportError:
            continue
        there += sum(hasattr(found, name) for name in names)

    assert there / total > 0.4, f"{there} of {total}"


@pytest.mark.parametrize(("module", "names"), [*NAMES.items(), *MODULES.items()])
def test_each_name_of_the_tables_is_there(module: str, names: dict[str, str]) -> None:
    place = importlib.import_module(module)

    for name in names:
        assert getattr(place, name) is not None, name


def test_modules_that_are_nowhere_are_still_an_import_error() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"amqtask\.nowhere"):
        importlib.import_module("amqtask.nowhere")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = find("app").nothing


def test_a_task_that_is_asked_to_abort_sees_it() -> None:
    abortable = find("contrib.abortable")
    app = AmqTask("tests", broker="memory://", backend="cache+memory://")

    @app.task(bind=True, base=abortable.AbortableTask)
    def work(self: Any) -> str:
        while not self.is_aborted():
            pass
        return "stopped"

    with start_worker(app, pool="threads"):
        result = work.delay()
        by_id: Any = work.AsyncResult(result.id)
        by_id.abort()
        assert result.get(60) == "stopped"


def test_the_helpers_for_times() -> None:
    times = find("utils.time")
    noon = datetime(2026, 1, 1, 12)

    assert times.maybe_make_aware(noon).tzinfo is timezone.utc
    assert times.maybe_timedelta(30) == timedelta(seconds=30)
    assert times.maybe_iso8601("2026-01-01T12:00:00Z") == noon.replace(tzinfo=timezone.utc)
    assert times.remaining(noon, timedelta(hours=1), noon) == timedelta(hours=1)
    assert times.humanize_seconds(120) == "2.00 minutes"
    assert times.rate("10/m") == pytest.approx(1 / 6)
    assert times.timezone.get_timezone("Europe/Berlin").key == "Europe/Berlin"


def test_the_helpers_for_names_and_imports() -> None:
    assert find("utils").nodesplit("w1@host") == ("w1", "host")
    assert find("utils.imports").symbol_by_name("amqtask.app:AmqTask") is AmqTask
    assert find("utils.imports").qualname(AmqTask) == "amqtask.app.AmqTask"
    assert find("utils.text").abbrtask("a.very.long.module.task", 12) == "a.very.l[.]task"
    assert find("utils.serialization").strtobool("yes") is True
    assert list(find("utils.functional").chunks(range(5), 2)) == [[0, 1], [2, 3], [4]]


def test_what_is_current_is_told_at_celery_s_place() -> None:
    state, app = find("_state"), AmqTask("tests", broker="memory://", backend="cache+memory://")
    told: list[Any] = []

    @app.task
    def work() -> None:
        told.extend([state.get_current_task().name, state._task_stack.top.name])

    with start_worker(app):
        work.delay().get(60)

    assert told == [work.name, work.name]
    assert state.get_current_task() is None
    assert state.get_current_app() is app


def test_versions_are_compared_as_tuples() -> None:
    assert find("").VERSION >= (0, 1)
    assert find("app").app_or_default() is find("").current_app()


class NeedsTwo(ValueError):
    """Cannot be pickled: pickle makes it with its args alone."""

    def __init__(self, first: str, second: int) -> None:
        super().__init__(first)
        self.second = second


class OfItsOwn(Exception):
    def __init__(self, first: str, second: object) -> None:
        super().__init__(first, second)


def test_the_helpers_for_exceptions_that_cannot_be_pickled() -> None:
    helpers = find("utils.serialization")
    stays, wide, locked = KeyError("k"), NeedsTwo("no", 2), OfItsOwn("no", lambda: None)

    assert helpers.get_pickleable_exception(stays) is stays
    nearest = helpers.get_pickleable_exception(wide)
    assert (type(nearest), nearest.args) == (ValueError, ("no",))
    wrapped = helpers.get_pickleable_exception(locked)
    assert isinstance(wrapped, helpers.UnpickleableExceptionWrapper)
    again = pickle.loads(pickle.dumps(wrapped))
    assert (again.exc_cls_name, again.exc_args[0], str(again)) == ("OfItsOwn", "no", str(wrapped))
    restored = helpers.get_pickled_exception(again)
    assert (type(restored).__name__, restored.args[0]) == ("OfItsOwn", "no")
    assert helpers.get_pickleable_etype(NeedsTwo) is NeedsTwo
    assert helpers.create_exception_cls("Mine", "here", KeyError).__bases__ == (KeyError,)
    try:
        raise stays
    except KeyError:
        with pytest.raises(NeedsTwo) as raised:
            helpers.raise_with_context(wide)
    assert raised.value.__cause__ is stays


def test_what_json_cannot_carry_is_made_plain() -> None:
    jsonify = find("utils.serialization").jsonify
    moment = datetime(2026, 1, 2, 3, 4, 5, 678_000, tzinfo=timezone.utc)

    plain = jsonify(
        {"when": moment, "list": (1, None), "span": timedelta(hours=1), "secret": 1}, keyfilter=lambda k: k != "secret"
    )
    assert plain == {"when": "2026-01-02T03:04:05.678Z", "list": [1, None], "span": "1:00:00"}
    assert jsonify(object, unknown_type_filter=lambda value: value.__name__) == "object"
    with pytest.raises(ValueError, match="Unsupported type"):
        jsonify({"x": object()})


def test_workers_of_tests_have_names_and_queues_of_their_own() -> None:
    app = AmqTask("tests", broker="memory://", backend="cache+memory://")
    start = find("contrib.testing.worker").start_worker

    with (
        start(app, queues=["one"], perform_ping_check=False) as first,
        start(app, queues="two,three", exclude_queues=["three"]) as second,
    ):
        assert [queue.name for queue in first.queues] == ["one"]
        assert [queue.name for queue in second.queues] == ["two"]
        assert first.hostname != second.hostname
