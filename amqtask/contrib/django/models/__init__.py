"""The tables: results (under django-celery-results' names), periodic tasks (under django-celery-beat's), the outbox."""

from amqtask.contrib.django.models.outbox import OutboxMessage
from amqtask.contrib.django.models.results import GroupResult, TaskResult
from amqtask.contrib.django.models.schedules import (
    ClockedSchedule,
    CrontabSchedule,
    IntervalSchedule,
    PeriodicTask,
    PeriodicTasks,
    SolarSchedule,
)

__all__ = [
    "ClockedSchedule",
    "CrontabSchedule",
    "GroupResult",
    "IntervalSchedule",
    "OutboxMessage",
    "PeriodicTask",
    "PeriodicTasks",
    "SolarSchedule",
    "TaskResult",
]
