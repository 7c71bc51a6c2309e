"""Routes: where a call goes, in Celery's order of precedence."""

from __future__ import annotations

import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from amqtask import AmqTask
from amqtask.exceptions import ConfigurationError, QueueNotFound
from amqtask.protocol.entities import Exchange, Queue
from amqtask.topology.declarations import QueueDefaults
from amqtask.topology.routes import Queues, Route, Router

TOPIC = Exchange("topics", type="topic")
FANOUT = Exchange("all", type="fanout")
CLASSIC = QueueDefaults(queue_type="classic", dead_letter=False)


def queues() -> Queues:
    return Queues(
        [
            Queue("default"),
            Queue("direct", exchange=Exchange("d"), routing_key="direct.key"),
            Queue("feeds", exchange=TOPIC, routing_key="feed.#"),
            Queue("bcast", exchange=FANOUT, broadcast=True, auto_delete=True),
        ],
        default_queue="default",
    )


def where(route: Route) -> tuple[str, str]:
    return route.exchange, route.routing_key


def by_function(name: str, args: Any, kwargs: Any, options: Any, task: Any = None, **_: Any) -> Any:
    return {"queue": "from-function", "priority": 1} if name == "app.called" else None


ROUTES: Any = (
    [
        ("app.exact", "exact"),
        ("app.*", {"queue": "globbed"}),
        (re.compile(r"(video|image)\..*"), {"queue": "media", "priority": 4}),
    ],
    by_function,
    {"feeds.*": {"queue": "feeds", "routing_key": "feed.import"}, "none.*": {"exchange": "elsewhere"}},
)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("app.exact", ("", "exact")),
        ("app.other", ("", "globbed")),
        ("video.encode", ("", "media")),
        ("feeds.get", ("topics", "feed.import")),
        ("none.x", ("elsewhere", "")),
        ("unknown", ("", "default")),
    ],
)
def test_the_first_route_that_knows_the_task_decides(name: str, target: tuple[str, str]) -> None:
    assert where(Router(ROUTES, queues()).route(name)) == target


@pytest.mark.parametrize(
    ("options", "target"),
    [
        ({}, ("", "default")),
        ({"queue": "direct"}, ("", "direct")),
        ({"queue": "direct", "routing_key": "other"}, ("", "direct")),
        ({"queue": "direct", "exchange": "d", "routing_key": "other"}, ("d", "other")),
        ({"queue": "feeds"}, ("topics", "feed.#")),
        ({"queue": "feeds", "routing_key": "feed.x"}, ("topics", "feed.x")),
        ({"queue": "new"}, ("", "new")),
        ({"exchange": "anywhere", "routing_key": "key"}, ("anywhere", "key")),
        ({"exchange": "anywhere"}, ("anywhere", "")),
        ({"exchange": TOPIC, "routing_key": "a.b"}, ("topics", "a.b")),
        ({"queue": Queue("own", exchange=TOPIC, routing_key="own.key")}, ("topics", "own.key")),
        ({"queue": None, "exchange": None}, ("", "default")),
    ],
)
def test_the_calls_own_options_say_where(options: dict[str, Any], target: tuple[str, str]) -> None:
    assert where(Router((), queues()).route("t", options=options)) == target


def test_a_queue_given_by_the_caller_is_not_routed_again() -> None:
    def never(*_args: Any, **_options: Any) -> Any:
        pytest.fail("asked for a route")

    assert where(Router(never, queues()).route("t", options={"queue": "direct"})) == ("", "direct")


def test_the_callers_other_options_win_over_the_routes() -> None:
    router = Router({"t": {"queue": "media", "priority": 4, "expires": 10}}, queues())

    route = router.route("t", options={"priority": 9, "countdown": 1})

    assert route.options == {"priority": 9, "expires": 10, "countdown": 1}
    assert route.routing_key == "media"


def test_a_route_sees_the_call() -> None:
    seen: list[Any] = []

    def route(name: str, args: Any, kwargs: Any, options: Any, task: Any = None, **_: Any) -> None:
        seen.append((name, args, kwargs, options, task))

    task = SimpleNamespace(queue=None, exchange=None, routing_key=None)
    Router([route], queues()).route("t", (1,), {"a": 2}, {"priority": 3, "expires": None}, task=task)

    assert seen == [("t", (1,), {"a": 2}, {"priority": 3}, task)]


def test_created_queues_get_an_exchange_of_their_own_when_a_type_is_asked_for() -> None:
    found = Queues(create_missing_exchange_type="topic")

    assert found["media"].exchange == Exchange("media", type="topic")
    assert where(Router((), found).route("t", options={"queue": "media"})) == ("media", "media")
    assert where(Router((), found).route("t")) == ("", "amqtask")


class OldRouter:
    def route_for_task(self, task: str, args: Any = None, kwargs: Any = None) -> Any:
        return {"queue": f"old-{task}"}


@pytest.mark.parametrize("router", [OldRouter, OldRouter(), f"{__name__}.OldRouter", f"{__name__}:OldRouter"])
def test_router_objects_and_dotted_paths_work(router: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, __name__, sys.modules[OldRouter.__module__])

    assert where(Router([router], queues()).route("t")) == ("", "old-t")


@pytest.mark.parametrize("routes", [5, [5], "no.such.module.route", "noname"])
def test_what_is_no_route_is_refused_at_once(routes: Any) -> None:
    with pytest.raises(ConfigurationError, match="task_routes"):
        Router(routes, queues())


def test_a_route_that_answers_nonsense_is_named_with_its_task() -> None:
    with pytest.raises(ConfigurationError, match=r"route of task 'app\.x' is 5"):
        Router({"app.*": 5}, queues()).route("app.x")


def test_a_queue_is_declared_with_all_it_needs() -> None:
    route = Router((), queues()).route("t", options={"queue": "new"})

    assert route.queue is not None
    assert [getattr(entity, "name", "") for entity in route.declare] == ["new.dead", "new"]
    assert route.mandatory


def test_a_broadcast_may_find_nobody_listening() -> None:
    route = Router((), queues()).route("t", options={"queue": "bcast"})

    assert where(route) == ("all", "")
    assert route.declare == (FANOUT,)
    assert not route.mandatory


def test_missing_queues_are_created_or_refused_with_near_names() -> None:
    strict = Queues([Queue("feeds"), Queue("jobs")], default_queue="jobs", create_missing=False)

    with pytest.raises(QueueNotFound, match="did you mean 'feeds'"):
        Router((), strict).route("t", options={"queue": "feed"})


def test_missing_queues_may_have_a_type_of_their_own() -> None:
    mixed = Queues(defaults=CLASSIC, create_missing_type="quorum")

    assert mixed["new"].argument_map["x-queue-type"] == "quorum"
    assert mixed["amqtask"].argument_map["x-queue-type"] == "classic"


def names(found: Queues) -> list[str]:
    return [queue.name for queue in found.consumed]


def test_a_worker_consumes_what_is_configured_else_the_default_queue() -> None:
    alone = Queues()
    alone["seen"]  # a name that was only published to

    assert names(alone) == ["amqtask"]
    assert names(queues()) == ["default", "direct", "feeds", "bcast"]


def test_a_selection_is_consumed_and_nothing_else() -> None:
    found = queues()

    found.select(["new", "feeds"])

    assert names(found) == ["new", "feeds"]


def test_all_but_the_excluded_are_consumed() -> None:
    found = queues()

    found.deselect(["feeds", "bcast"])

    assert names(found) == ["default", "direct"]


def test_excluding_what_is_not_consumed_is_an_error_with_near_names() -> None:
    with pytest.raises(QueueNotFound, match=r"'feedz' is not consumed.*did you mean 'feeds'"):
        queues().deselect(["feedz"])


def test_an_unknown_queue_is_not_selected_when_missing_queues_are_not_created() -> None:
    strict = Queues([Queue("jobs")], create_missing=False)

    with pytest.raises(QueueNotFound):
        strict.select(["jobz"])


def test_threads_that_call_for_the_first_time_find_the_same_queues() -> None:
    app = AmqTask("threads", broker="memory://")
    barrier = threading.Barrier(4)

    def call(_: int) -> None:
        barrier.wait(60)
        for number in range(200):
            app.send_task("t", queue=f"q{number}", ignore_result=True)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(call, range(4)))
    finally:
        sys.setswitchinterval(interval)
        app.close()
