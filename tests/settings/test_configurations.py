"""Which of several configurations counts: what the application was made with, objects, variables of the environment."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

from amqtask import AmqTask
from amqtask.exceptions import ConfigurationError


@pytest.fixture
def config() -> Iterator[types.ModuleType]:
    """A module with settings that can be imported."""
    module = types.ModuleType("a_configuration")
    vars(module).update(broker_url="amqp://module//", timezone="Europe/Oslo")
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


def make(**options: Any) -> AmqTask:
    return AmqTask("settings", set_as_current=False, **options)


def test_what_an_application_is_made_with_counts_more_than_an_object_that_is_read_later() -> None:
    app = make(broker="amqp://made//", task_time_limit=5)
    app.config_from_object({"broker_url": "amqp://read//", "task_time_limit": 7, "timezone": "Europe/Oslo"})

    assert (app.conf.broker_url, app.conf.task_time_limit, app.conf.timezone) == ("amqp://made//", 5, "Europe/Oslo")

    app.config_from_object({"broker_url": "amqp://again//"})
    assert app.conf.broker_url == "amqp://made//"


def test_so_does_what_is_set_before_anything_is_looked_at() -> None:
    app = make()
    app.conf.broker_url = "amqp://set//"
    app.conf.update(task_time_limit=5)
    app.config_from_object({"broker_url": "amqp://read//", "task_time_limit": 7})

    assert (app.conf.broker_url, app.conf.task_time_limit) == ("amqp://set//", 5)


def test_what_is_set_after_a_look_gives_way_to_an_object_that_is_read_later() -> None:
    app = make()
    assert app.conf.broker_url is None
    app.conf.broker_url = "amqp://set//"
    app.config_from_object({"broker_url": "amqp://read//"})

    assert app.conf.broker_url == "amqp://read//"


def test_an_object_takes_the_place_of_the_one_before() -> None:
    app = make()
    app.config_from_object({"broker_url": "amqp://one//", "CELERY_ONCE": 1, "task_always_eager": True})
    assert (app.conf.broker_url, app.conf.CELERY_ONCE) == ("amqp://one//", 1)
    app.conf.task_time_limit = 5
    app.config_from_object({"timezone": "Europe/Oslo"})

    assert (app.conf.broker_url, app.conf.task_always_eager, app.conf.timezone) == (None, False, "Europe/Oslo")
    assert not hasattr(app.conf, "CELERY_ONCE")
    assert app.conf.task_time_limit == 5


def test_an_object_that_cannot_be_read_takes_no_place() -> None:
    app = make()
    app.config_from_object({"broker_url": "amqp://one//"})
    assert app.conf.broker_url == "amqp://one//"
    app.config_from_object("no_such_module", silent=True)

    assert app.conf.broker_url == "amqp://one//"


def test_the_variables_that_win_over_settings_are_seen_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    app = make(broker="amqp://made//", backend="rpc://")
    for name in ("BROKER_URL", "BROKER_READ_URL", "BROKER_WRITE_URL", "RESULT_BACKEND"):
        monkeypatch.setenv(f"CELERY_{name}", f"redis://{name.lower()}/")

    assert app.conf.broker_url == app.conf["broker_url"] == app.conf.BROKER_URL == "redis://broker_url/"
    assert app.conf.broker_read_url == "redis://broker_read_url/"
    assert app.conf.broker_write_url == "redis://broker_write_url/"
    assert app.conf.get("result_backend") == "redis://result_backend/"
    monkeypatch.delenv("CELERY_BROKER_URL")
    assert app.conf.broker_url == "amqp://made//"


def test_a_module_that_the_environment_names_configures_applications_that_have_no_configuration(
    config: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CELERY_CONFIG_MODULE", config.__name__)
    configured = make()
    configured.config_from_object({"task_time_limit": 5})

    assert make().conf.broker_url == "amqp://module//"
    assert make(broker="amqp://made//").conf.broker_url == "amqp://made//"
    assert make(broker="amqp://made//").conf.timezone == "Europe/Oslo"
    assert (configured.conf.broker_url, configured.conf.timezone) == (None, None)
    assert make(config_source={"broker_url": "amqp://source//"}).conf.timezone is None
    monkeypatch.setenv("CELERY_CONFIG_MODULE", "no_such_module")
    with pytest.raises(ConfigurationError, match="no_such_module"):
        _ = make().conf.broker_url


@pytest.mark.parametrize("path", ["", "a b", ".tasks"])
def test_the_name_of_a_configuration_that_is_no_name_is_told(path: str) -> None:
    app = make()
    app.config_from_object(path)

    with pytest.raises(ConfigurationError, match="configuration module"):
        _ = app.conf.broker_url
