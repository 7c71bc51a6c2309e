"""The Django application: its label, which is the prefix of its tables, too."""

from __future__ import annotations

from typing import Any

from django.apps import AppConfig
from django.db.models import signals
from django.utils.translation import gettext_lazy as _


class AmqTaskConfig(AppConfig):
    """`amqtask.contrib.django` under the label `amqtask`."""

    name = "amqtask.contrib.django"
    label = "amqtask"
    verbose_name = _("Tasks (amqtask)")
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Have every change of the periodic tasks noted, whoever makes it."""
        changes: Any = self.get_model("PeriodicTasks")
        for name in ("PeriodicTask", "IntervalSchedule", "CrontabSchedule", "SolarSchedule", "ClockedSchedule"):
            for signal in (signals.post_save, signals.post_delete):
                signal.connect(changes.update_changed, sender=self.get_model(name))
