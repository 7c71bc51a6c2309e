"""Schedules of a Django project are in its time zone."""

from __future__ import annotations

from django.conf import settings
from django.test import override_settings

from amqtask import AmqTask


def test_schedules_are_in_djangos_time_zone_unless_the_setting_says_another(project: AmqTask) -> None:
    app = AmqTask("tasks", broker="memory://", set_as_current=False)
    assert str(app.timezone) == settings.TIME_ZONE
    app.conf.timezone = "Asia/Tokyo"
    assert str(app.timezone) == "Asia/Tokyo"


def test_the_setting_shows_djangos_time_zone_until_another_is_set(project: AmqTask) -> None:
    app = AmqTask("tasks", broker="memory://", set_as_current=False)
    assert app.conf.timezone == settings.TIME_ZONE
    with override_settings(TIME_ZONE="Asia/Tokyo"):
        assert app.conf.timezone == "Asia/Tokyo"
    assert not app.conf.is_set("timezone")
    app.conf.timezone = "Europe/Paris"
    assert (app.conf.timezone, app.conf["timezone"]) == ("Europe/Paris", "Europe/Paris")
    del app.conf["timezone"]
    assert app.conf.timezone == settings.TIME_ZONE
