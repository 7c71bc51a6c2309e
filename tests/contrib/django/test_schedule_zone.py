"""Schedules of a Django project are in its time zone."""

from __future__ import annotations

from django.conf import settings

from amqtask import AmqTask


def test_schedules_are_in_djangos_time_zone_unless_the_setting_says_another(project: AmqTask) -> None:
    app = AmqTask("tasks", broker="memory://", set_as_current=False)
    assert str(app.timezone) == settings.TIME_ZONE
    app.conf.timezone = "Asia/Tokyo"
    assert str(app.timezone) == "Asia/Tokyo"
