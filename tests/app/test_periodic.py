"""`app.add_periodic_task` and the application's clock."""

from __future__ import annotations

from typing import Any
from zoneinfo import ZoneInfo

import pytest

from amqtask import AmqTask, crontab
from amqtask.exceptions import ConfigurationError


def make_app(**settings: Any) -> AmqTask:
    app = AmqTask("tasks", broker="memory://", set_as_current=False, **settings)

    @app.task(name="tasks.say")
    def say(word: str, times: int = 1) -> str:
        return word * times

    return app


def test_a_signature_becomes_an_entry_with_its_options() -> None:
    app = make_app()
    say = app.tasks["tasks.say"]
    app.add_periodic_task(10.0, say.s("hello"), name="ten seconds", expires=5)
    app.add_periodic_task(crontab(0, 7), say.s("hello").set(queue="far"), kwargs={"times": 2})
    app.add_periodic_task(30, say, args=("plain",))

    found = app.conf.beat_schedule
    assert list(found) == ["ten seconds", "tasks.say('hello', times=2)", "tasks.say('plain')"]
    assert found["ten seconds"] == {
        "schedule": 10.0,
        "task": "tasks.say",
        "args": ("hello",),
        "kwargs": {},
        "options": {"expires": 5},
    }
    assert found["tasks.say('hello', times=2)"]["options"] == {"queue": "far"}
    assert found["tasks.say('hello', times=2)"]["kwargs"] == {"times": 2}


def test_entries_are_added_to_those_of_a_configuration_that_is_read_later() -> None:
    app = make_app()
    app.add_periodic_task(10.0, app.tasks["tasks.say"].s("hello"), name="added")
    app.config_from_object({"beat_schedule": {"configured": {"task": "tasks.say", "schedule": 5}}})
    assert set(app.conf.beat_schedule) == {"added", "configured"}


@pytest.mark.parametrize("signal", ["on_after_configure", "on_after_finalize"])
def test_receivers_of_the_applications_signals_may_add_them(signal: str) -> None:
    app = make_app()

    @getattr(app, signal).connect  # type: ignore[untyped-decorator]
    def add(sender: AmqTask, **_: Any) -> None:
        sender.add_periodic_task(10.0, sender.tasks["tasks.say"].s("hello"), name="from a receiver")

    app.finalize()
    assert "from a receiver" in app.conf.beat_schedule


def test_a_second_one_of_the_same_text_is_said(caplog: pytest.LogCaptureFixture) -> None:
    app = make_app()
    for seconds in (10, 20):
        app.add_periodic_task(seconds, app.tasks["tasks.say"].s("hello"))
    assert app.conf.beat_schedule["tasks.say('hello')"]["schedule"] == 20
    assert "its own name" in caplog.text


def test_many_are_added_as_well_as_few() -> None:
    app = make_app()
    for number in range(3000):
        app.add_periodic_task(10, app.tasks["tasks.say"].s("hello"), name=str(number))
    assert len(app.conf.beat_schedule) == 3000


def test_the_time_zone_of_schedules_is_the_setting() -> None:
    assert str(make_app().timezone) == "UTC"
    app = make_app(timezone="Asia/Shanghai")
    assert app.timezone == ZoneInfo("Asia/Shanghai")
    assert str(app.now().utcoffset()) == "8:00:00"
    app.conf.timezone = "Nowhere/Town"
    with pytest.raises(ConfigurationError, match="no time zone"):
        _ = app.timezone
