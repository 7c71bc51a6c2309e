"""The tables: results (under django-celery-results' names) and periodic tasks (under django-celery-beat's)."""

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
    "PeriodicTask",
    "PeriodicTasks",
    "SolarSchedule",
    "TaskResult",
]
