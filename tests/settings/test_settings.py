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


def test_an_unknown_setting_that_is_read_names_the_closest(app: AmqTask) -> None:
    with pytest.raises(SettingUnknown, match="'worker_concurrency'"):
        _ = app.conf.worker_concurency
    with pytest.raises(KeyError, match="nonsense"):
        _ = app.conf["nonsense"]
    assert not hasattr(app.conf, "nonsense")
    assert app.conf.get("nonsense", 3) == 3
    assert "nonsense" not in app.conf


def test_settings_of_others_are_kept_and_can_be_read(app: AmqTask) -> None:
    app.conf.ONCE = {"backend": "redis"}
    app.conf["lock_timeout"] = 5
    app.conf.update({"redbeat_redis_url": "redis://"}, singleton_key_prefix="one:")

    assert app.conf.ONCE == app.conf["ONCE"] == app.conf.get("ONCE") == {"backend": "redis"}
    assert (app.conf.lock_timeout, app.conf.redbeat_redis_url) == (5, "redis://")
    assert app.conf.singleton_key_prefix == "one:"
    assert {"ONCE", "lock_timeout"} <= set(app.conf) == set(dict(app.conf))
    del app.conf["ONCE"]
    assert not hasattr(app.conf, "ONCE")


@pytest.mark.parametrize("namespace", ["CELERY", "CELERY_", "QUEUE"])
def test_settings_of_others_in_a_namespace_are_read_without_it(app: AmqTask, namespace: str) -> None:
    prefix = namespace.rstrip("_")
    app.config_from_object({f"{prefix}_ONCE_TIMEOUT": 5, f"{prefix}_BROKER_URL": "memory://"}, namespace=namespace)

    assert app.conf.once_timeout == app.conf.ONCE_TIMEOUT == app.conf[f"{prefix}_ONCE_TIMEOUT"] == 5
    app.conf.once_timeout = 6
    assert app.conf.once_timeout == 6


def test_settings_of_others_in_a_module_or_class_can_be_read(app: AmqTask) -> None:
    class Config:
        broker_url = "memory://"
        redbeat_lock_timeout = 7
        ONCE = {"backend": "file"}  # noqa: RUF012

    app.config_from_object(Config)
    Config.redbeat_lock_timeout = 8

    assert (app.conf.redbeat_lock_timeout, app.conf.ONCE) == (8, {"backend": "file"})
    assert "redbeat_lock_timeout" in app.conf


def test_a_near_miss_is_told_once(app: AmqTask, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"CELERY_TASK_ROUTE": {}, "CELERY_ONCE": {}, "CELERY_WORKER_CONCURENCY": 1}
    app.config_from_object(settings, namespace="CELERY")

    assert app.conf.broker_url is None
    app.conf["CELERY_TASK_ROUTE"] = {}
    (told,) = caplog.messages
    assert "CELERY_TASK_ROUTE (did you mean task_routes?)" in told
    assert "CELERY_WORKER_CONCURENCY (did you mean worker_concurrency?)" in told
    assert "CELERY_ONCE" not in told
    assert app.conf.unknown_names() == {
        "CELERY_ONCE": None,
        "CELERY_TASK_ROUTE": "task_routes",
        "CELERY_WORKER_CONCURENCY": "worker_concurrency",
    }


def test_a_near_miss_that_is_set_is_told(app: AmqTask, caplog: pytest.LogCaptureFixture) -> None:
    app.conf.task_route = {"a": "b"}

    assert app.conf.task_route == {"a": "b"}
    assert "task_route (did you mean task_routes?)" in caplog.text


def test_strict_settings_make_all_unknown_names_an_error(app: AmqTask) -> None:
    settings = {"CELERY_TASK_ROUTE": {}, "CELERY_ONCE": {}, "CELERY_STRICT_SETTINGS": True}
    app.config_from_object(settings, namespace="CELERY")

    with pytest.raises(SettingUnknown, match=r"'CELERY_TASK_ROUTE' and no 'CELERY_ONCE'.*'task_routes'"):
        _ = app.conf.broker_url
    with pytest.raises(SettingUnknown, match="DEBUGG"):
        app.conf.update(DEBUGG=True)
    with pytest.raises(SettingUnknown, match="'task_routes'"):
        app.conf.task_route = {}


def test_settings_of_others_end_with_their_block(app: AmqTask) -> None:
    app.conf.mine = 1
    with app.conf.overridden({"mine": 2, "yours": 3}):
        assert (app.conf.mine, app.conf.yours) == (2, 3)

    assert app.conf.mine == 1
    assert not hasattr(app.conf, "yours")


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
    assert app.conf.table()["broker_url"] == "amqp://user:********@host//"
    assert app.conf.table(censored=False)["broker_url"] == "amqp://user:secret@host//"
    assert "broker_url: 'amqp://user:********@host//'" in app.conf.humanize().splitlines()
    assert "secret" in app.conf.humanize(with_defaults=True, censored=False)


def test_the_environment_is_the_last_resort(app: AmqTask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMQTASK_BROKER_URL", "amqp://somewhere:1234//")

    assert app.broker_addresses[0].host == "somewhere"
