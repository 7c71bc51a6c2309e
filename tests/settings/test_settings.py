"""Settings from everywhere, under all their names."""

from __future__ import annotations

import types
from datetime import timedelta

import pytest

from amqtask import AmqTask
from amqtask.exceptions import ConfigurationError, SettingUnknown


@pytest.fixture
def app() -> AmqTask:
    """An app of its own."""
    return AmqTask("settings", set_as_current=False)


def test_defaults_are_the_safe_ones(app: AmqTask) -> None:
    assert app.conf.task_acks_late is True
    assert app.conf.task_default_queue == "amqtask"
    assert app.conf["task_default_queue_type"] == "quorum"
    assert app.conf.broker_publish_timeout == 5.0


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ("BROKER_URL", "broker_url", "amqp://h//"),
        ("CELERY_BROKER_URL", "broker_url", "amqp://h//"),
        ("CELERY_RESULT_BACKEND", "result_backend", "rpc://"),
        ("CELERYD_MAX_TASKS_PER_CHILD", "worker_max_tasks_per_child", 10),
        ("CELERYD_CONCURRENCY", "worker_concurrency", 4),
        ("CELERY_TASK_RESULT_EXPIRES", "result_expires", 86400),
        ("CELERY_TIMEZONE", "timezone", "Asia/Shanghai"),
        ("CELERYBEAT_SCHEDULE", "beat_schedule", {"a": {}}),
        ("CELERY_IMPORTS", "imports", ["a", "b"]),
        ("CELERY_ROUTES", "task_routes", {"a": "b"}),
        ("CELERY_ACCEPT_CONTENT", "accept_content", ["application/json"]),
        ("CELERY_TASK_SERIALIZER", "task_serializer", "json"),
        ("CELERY_BACKEND_URL", "result_backend", "rpc://"),
        ("task_routes", "task_routes", {"a": "b"}),
    ],
)
def test_old_and_upper_case_names_are_accepted(app: AmqTask, given: str, name: str, value: object) -> None:
    app.conf.update({given: value})

    assert app.conf[name] == value


def test_an_unknown_setting_names_the_closest(app: AmqTask) -> None:
    with pytest.raises(SettingUnknown, match="'task_routes'"):
        app.conf.task_route = {}
    with pytest.raises(SettingUnknown, match="'worker_concurrency'"):
        _ = app.conf.worker_concurency
    assert not hasattr(app.conf, "nonsense")


def test_a_namespace_takes_only_its_own(app: AmqTask) -> None:
    settings = types.SimpleNamespace(
        CELERY_TASK_ALWAYS_EAGER=True, CELERYD_CONCURRENCY=3, BROKER_URL="amqp://no", DEBUG=1
    )
    app.config_from_object(settings, namespace="CELERY")

    assert app.conf.task_always_eager is True
    assert app.conf.worker_concurrency == 3
    assert app.conf.broker_url is None


def test_any_namespace_works(app: AmqTask) -> None:
    app.config_from_object({"QUEUE_BROKER_URL": "amqp://h//"}, namespace="QUEUE")

    assert app.conf.broker_url == "amqp://h//"


def test_a_mistake_inside_a_namespace_is_an_error(app: AmqTask) -> None:
    app.config_from_object({"CELERY_TASK_ROUTE": {}}, namespace="CELERY")

    with pytest.raises(SettingUnknown, match="task_routes"):
        _ = app.conf.broker_url


def test_a_module_may_hold_other_things(app: AmqTask) -> None:
    module = types.ModuleType("config")
    vars(module).update({"broker_url": "amqp://h//", "os": object(), "helper": print, "DEBUG": True})
    app.config_from_object(module)

    assert app.conf.broker_url == "amqp://h//"


def test_config_from_envvar_names_the_variable(app: AmqTask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_CONFIG", raising=False)

    with pytest.raises(ConfigurationError, match="MY_CONFIG"):
        app.config_from_envvar("MY_CONFIG")


def test_values_are_checked_and_converted(app: AmqTask) -> None:
    app.conf.result_expires = timedelta(hours=1)
    app.conf.task_ignore_result = "yes"

    assert app.conf.result_expires == 3600
    assert app.conf.task_ignore_result is True
    with pytest.raises(ConfigurationError, match="task_time_limit"):
        app.conf.task_time_limit = "soon"


def test_mutable_defaults_are_not_shared(app: AmqTask) -> None:
    app.conf.beat_schedule["a"] = {}

    assert AmqTask("other", set_as_current=False).conf.beat_schedule == {}


def test_foreign_settings_of_celery_are_accepted_without_effect(app: AmqTask) -> None:
    app.conf.mongodb_backend_settings = {"a": 1}

    assert app.conf.mongodb_backend_settings == {"a": 1}


def test_secrets_are_masked(app: AmqTask) -> None:
    app.conf.broker_url = "amqp://user:secret@host//"
    app.conf.redis_password = "secret"

    assert "secret" not in repr(app.conf)
    assert app.conf.humanize()["broker_url"] == "amqp://user:********@host//"


def test_the_environment_is_the_last_resort(app: AmqTask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMQTASK_BROKER_URL", "amqp://somewhere:1234//")

    assert app.broker_addresses[0].host == "somewhere"
