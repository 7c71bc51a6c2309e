"""The tables: results (under django-celery-results' names), periodic tasks (under django-celery-beat's), the outbox."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from django.core.exceptions import ValidationError
from django.core.validators import MaxValueValidator, MinValueValidator
from django.db import models
from django.utils import timezone
from django.utils.translation import gettext_lazy as _

from amqtask import cron, schedules, states
from amqtask.contrib.django.zones import TimeZoneField, UnknownZone, aware, default_zone, stored
from amqtask.exceptions import ConfigurationError
from amqtask.schedules import ParseException

if TYPE_CHECKING:
    from amqtask.ground.shapes import JsonObject

# -- Calls that wait for a relay: the transactional outbox (docs/outbox.md).


class OutboxMessage(models.Model):
    """One message of a committed transaction, until the broker has it. The columns are those of amqtask.contrib.sqlalchemy."""

    id = models.BigAutoField(primary_key=True)
    task_id = models.CharField(_("task id"), max_length=255)
    task = models.CharField(_("task"), max_length=255)
    message = models.TextField(_("message"), editable=False)
    body = models.BinaryField(_("body"))
    created_at = models.DateTimeField(_("created"), default=timezone.now)
    attempts = models.IntegerField(_("attempts"), default=0)
    error = models.TextField(_("error"), null=True)
    retry_at = models.DateTimeField(_("next attempt"), null=True)

    class Meta:
        db_table = "amqtask_outbox"
        ordering = ("id",)
        verbose_name = _("outgoing call")
        verbose_name_plural = _("outbox")

    def __str__(self) -> str:
        return f"{self.task}[{self.task_id}]"


class InboxCall(models.Model):
    """A call of a task with inbox=True that has run, and its result. The columns are those of amqtask.contrib.sqlalchemy."""

    task_id = models.CharField(_("task id"), max_length=255, primary_key=True)
    task = models.CharField(_("task"), max_length=255)
    created_at = models.DateTimeField(_("created"), default=timezone.now, db_index=True)
    content_type = models.CharField(_("content type"), max_length=128, null=True)
    content_encoding = models.CharField(_("encoding"), max_length=64, null=True)
    body = models.BinaryField(_("result"), default=b"")

    class Meta:
        db_table = "amqtask_inbox"
        verbose_name = _("call that has run")
        verbose_name_plural = _("inbox")

    def __str__(self) -> str:
        return f"{self.task}[{self.task_id}]"


# -- Results of tasks and of groups, in the columns of django-celery-results (django_celery_results/models.py).

STATES = sorted(states.ALL_STATES)


class TaskResult(models.Model):
    """What is known of one task. `result` and `meta` are encoded as content_type and content_encoding say."""

    task_id = models.CharField(_("task id"), max_length=255, unique=True)
    periodic_task_name = models.CharField(
        _("periodic task"), max_length=255, null=True, help_text=_("The periodic task that published it")
    )
    task_name = models.CharField(_("task"), max_length=255, null=True)
    task_args = models.TextField(_("positional arguments"), null=True)
    task_kwargs = models.TextField(_("keyword arguments"), null=True)
    status = models.CharField(_("state"), max_length=50, default=states.PENDING)
    worker = models.CharField(_("worker"), max_length=100, default=None, null=True)
    content_type = models.CharField(_("content type"), max_length=128)
    content_encoding = models.CharField(_("encoding"), max_length=64)
    result = models.TextField(_("result"), null=True, default=None, editable=False)
    date_created = models.DateTimeField(_("created"), auto_now_add=True)
    date_started = models.DateTimeField(_("started"), null=True, default=None)
    date_done = models.DateTimeField(_("last change"), auto_now=True)
    traceback = models.TextField(_("traceback"), blank=True, null=True)
    meta = models.TextField(_("children and more"), null=True, default=None, editable=False)

    class Meta:
        ordering = ("-date_done",)
        verbose_name = _("task result")
        verbose_name_plural = _("task results")
        indexes = (
            models.Index(fields=["task_name"], name="amqtask_result_name_idx"),
            models.Index(fields=["status"], name="amqtask_result_status_idx"),
            models.Index(fields=["worker"], name="amqtask_result_worker_idx"),
            models.Index(fields=["date_created"], name="amqtask_result_created_idx"),
            models.Index(fields=["date_done"], name="amqtask_result_done_idx"),
            models.Index(fields=["periodic_task_name"], name="amqtask_result_periodic_idx"),
        )

    def as_dict(self) -> JsonObject:
        """The fields that a result has everywhere, as they are stored."""
        return {
            "task_id": self.task_id,
            "task_name": self.task_name,
            "task_args": self.task_args,
            "task_kwargs": self.task_kwargs,
            "status": self.status,
            "result": self.result,
            "date_done": self.date_done,
            "traceback": self.traceback,
            "meta": self.meta,
            "worker": self.worker,
        }

    def __str__(self) -> str:
        return f"<Task: {self.task_id} ({self.status})>"


class GroupResult(models.Model):
    """The members of a saved group (`GroupResult.save`)."""

    group_id = models.CharField(_("group id"), max_length=255, unique=True)
    date_created = models.DateTimeField(_("created"), auto_now_add=True)
    date_done = models.DateTimeField(_("last change"), auto_now=True)
    content_type = models.CharField(_("content type"), max_length=128)
    content_encoding = models.CharField(_("encoding"), max_length=64)
    result = models.TextField(_("members"), null=True, default=None, editable=False)

    class Meta:
        ordering = ("-date_done",)
        verbose_name = _("group result")
        verbose_name_plural = _("group results")
        indexes = (
            models.Index(fields=["date_created"], name="amqtask_group_created_idx"),
            models.Index(fields=["date_done"], name="amqtask_group_done_idx"),
        )

    def as_dict(self) -> JsonObject:
        """Id, members and date, as they are stored."""
        return {"group_id": self.group_id, "result": self.result, "date_done": self.date_done}

    def __str__(self) -> str:
        return f"<Group: {self.group_id}>"


# -- Periodic tasks and when they run, in the columns of django-celery-beat (django_celery_beat/models.py).
#
# Saving or deleting a periodic task or a schedule sets the one row of PeriodicTasks in the same transaction (by Django's
# signals, see apps.py); a scheduler that finds another time there reads the tasks again. `QuerySet.update` sends no signals:
# call `PeriodicTasks.update_changed()` after it.

DAYS, HOURS, MINUTES, SECONDS, MICROSECONDS = "days", "hours", "minutes", "seconds", "microseconds"
PERIOD_CHOICES = (
    (DAYS, _("Days")),
    (HOURS, _("Hours")),
    (MINUTES, _("Minutes")),
    (SECONDS, _("Seconds")),
    (MICROSECONDS, _("Microseconds")),
)
SOLAR_SCHEDULES = (
    ("dawn_astronomical", _("Astronomical dawn")),
    ("dawn_civil", _("Civil dawn")),
    ("dawn_nautical", _("Nautical dawn")),
    ("dusk_astronomical", _("Astronomical dusk")),
    ("dusk_civil", _("Civil dusk")),
    ("dusk_nautical", _("Nautical dusk")),
    ("solar_noon", _("Solar noon")),
    ("sunrise", _("Sunrise")),
    ("sunset", _("Sunset")),
)
NOT_BOTH = _("Set an end or the seconds after which it expires, not both.")
# As in a crontab line, but for the order: amqtask.schedules.crontab's keywords.
CRON_FIELDS = {
    "minute": cron.MINUTE,
    "hour": cron.HOUR,
    "day_of_week": cron.DAY_OF_WEEK,
    "day_of_month": cron.DAY_OF_MONTH,
    "month_of_year": cron.MONTH_OF_YEAR,
}
KINDS = ("interval", "crontab", "solar", "clocked")


class PeriodicTasks(models.Model):
    """One row: when periodic tasks or schedules were changed last."""

    ident = models.SmallIntegerField(default=1, primary_key=True, unique=True)
    last_update = models.DateTimeField()

    class Meta:
        verbose_name = _("change of periodic tasks")
        verbose_name_plural = _("changes of periodic tasks")

    @classmethod
    def update_changed(cls, **_: object) -> None:
        """Have schedulers read the periodic tasks again. Takes what signals send, so that it may be a receiver."""
        cls.objects.update_or_create(ident=1, defaults={"last_update": timezone.now()})

    @classmethod
    def last_change(cls) -> datetime | None:
        """The time of the last change; None when nothing was ever changed."""
        changed_at: datetime | None = cls.objects.filter(ident=1).values_list("last_update", flat=True).first()
        return changed_at


class IntervalSchedule(models.Model):
    """Every so many seconds, minutes, hours or days."""

    DAYS, HOURS, MINUTES, SECONDS, MICROSECONDS = DAYS, HOURS, MINUTES, SECONDS, MICROSECONDS
    PERIOD_CHOICES = PERIOD_CHOICES

    every = models.IntegerField(_("number of periods"), validators=[MinValueValidator(1)])
    period = models.CharField(_("period"), max_length=24, choices=PERIOD_CHOICES)

    class Meta:
        verbose_name = _("interval")
        verbose_name_plural = _("intervals")
        ordering = ("period", "every")

    @property
    def schedule(self) -> schedules.schedule:
        """The schedule as beat takes it. Raises: ConfigurationError for a period that there is not."""
        if self.period not in dict(PERIOD_CHOICES):
            raise ConfigurationError(f"there is no period {self.period!r}; there are {', '.join(dict(PERIOD_CHOICES))}")
        try:
            return schedules.schedule(timedelta(**{self.period: self.every}))
        except (OverflowError, ValueError) as error:
            raise ConfigurationError(f"every {self.every} {self.period}: {error}") from error

    @classmethod
    def from_schedule(cls, schedule: schedules.schedule, period: str | None = None) -> IntervalSchedule:
        """The row of an interval, in seconds where that is a whole number; one that is new is not saved yet."""
        unit = period or (MICROSECONDS if schedule.run_every.microseconds else SECONDS)
        every = schedule.run_every // timedelta(**{unit: 1})
        return cls.objects.filter(every=every, period=unit).first() or cls(every=every, period=unit)

    @property
    def period_singular(self) -> str:
        """`second` for seconds."""
        return str(self.period)[:-1]

    def __str__(self) -> str:
        return f"every {self.period_singular}" if self.every == 1 else f"every {self.every} {self.period}"


class CrontabSchedule(models.Model):
    """At the times of a crontab line, in a time zone."""

    minute = models.CharField(
        _("minutes"), max_length=240, default="*", help_text=_('"*" for all, or like "0,30" or "*/5"')
    )
    hour = models.CharField(_("hours"), max_length=96, default="*", help_text=_('"*" for all, or like "8-17"'))
    day_of_month = models.CharField(
        _("days of the month"), max_length=124, default="*", help_text=_('"*" for all, or like "1,15"')
    )
    month_of_year = models.CharField(
        _("months"), max_length=64, default="*", help_text=_('"*" for all, or like "1,7" or "jan,jul"')
    )
    day_of_week = models.CharField(
        _("days of the week"), max_length=64, default="*", help_text=_('"*" for all, or like "mon-fri"; 0 is Sunday')
    )
    timezone = TimeZoneField(_("time zone"), default=default_zone)

    class Meta:
        verbose_name = _("crontab")
        verbose_name_plural = _("crontabs")
        ordering = ("month_of_year", "day_of_month", "day_of_week", "hour", "minute", "timezone")

    @property
    def schedule(self) -> schedules.crontab:
        """The schedule as beat takes it, in its own time zone. Raises: ParseException, ConfigurationError for an unknown zone."""
        if isinstance(self.timezone, UnknownZone):
            raise ConfigurationError(f"there is no time zone {self.timezone.key!r}")
        return schedules.crontab(
            self.minute, self.hour, self.day_of_week, self.day_of_month, self.month_of_year, tz=self.timezone
        )

    @classmethod
    def from_schedule(cls, schedule: schedules.crontab) -> CrontabSchedule:
        """The row of a crontab; one that is new is not saved yet."""
        fields = {name: _spec(getattr(schedule, f"_orig_{name}")) for name in CRON_FIELDS}
        zone = str(schedule.tz)
        return cls.objects.filter(**fields, timezone=zone).first() or cls(**fields, timezone=zone)

    def clean(self) -> None:
        """Raises: ValidationError, for each field that is none of a crontab."""
        errors = {}
        for name, field in CRON_FIELDS.items():
            try:
                field.parse(getattr(self, name) or "*")
            except ParseException as error:
                errors[name] = str(error)
        if errors:
            raise ValidationError(errors)

    def __str__(self) -> str:
        fields = (self.minute, self.hour, self.day_of_month, self.month_of_year, self.day_of_week)
        line = " ".join(str(field).replace(" ", "") or "*" for field in fields)
        return f"{line} (m/h/dM/MY/d) {self.timezone}"


class SolarSchedule(models.Model):
    """When the sun rises, sets or is highest at a place."""

    event = models.CharField(_("event"), max_length=24, choices=SOLAR_SCHEDULES)
    latitude = models.DecimalField(
        _("latitude"),
        max_digits=9,
        decimal_places=6,
        validators=[MinValueValidator(-90), MaxValueValidator(90)],
    )
    longitude = models.DecimalField(
        _("longitude"),
        max_digits=9,
        decimal_places=6,
        validators=[MinValueValidator(-180), MaxValueValidator(180)],
    )

    class Meta:
        verbose_name = _("solar event")
        verbose_name_plural = _("solar events")
        ordering = ("event", "latitude", "longitude")
        unique_together = (("event", "latitude", "longitude"),)

    @property
    def schedule(self) -> schedules.solar:
        """The schedule as beat takes it. Raises: ConfigurationError without the library (extra `solar`)."""
        return schedules.solar(self.event, float(self.latitude), float(self.longitude))

    @classmethod
    def from_schedule(cls, schedule: schedules.solar) -> SolarSchedule:
        """The row of a solar event; one that is new is not saved yet."""
        # As the columns keep it: six digits.
        position = {"latitude": Decimal(f"{schedule.lat:.6f}"), "longitude": Decimal(f"{schedule.lon:.6f}")}
        return cls.objects.filter(event=schedule.event, **position).first() or cls(event=schedule.event, **position)

    def __str__(self) -> str:
        return f"{self.get_event_display()} ({self.latitude}, {self.longitude})"


class ClockedSchedule(models.Model):
    """Once, at a time."""

    clocked_time = models.DateTimeField(_("time"))

    class Meta:
        verbose_name = _("clocked time")
        verbose_name_plural = _("clocked times")
        ordering = ("clocked_time",)

    @property
    def schedule(self) -> schedules.clocked:
        """The schedule as beat takes it."""
        return schedules.clocked(aware(self.clocked_time))

    @classmethod
    def from_schedule(cls, schedule: schedules.clocked) -> ClockedSchedule:
        """The row of a time; one that is new is not saved yet."""
        when = stored(schedule.clocked_time)
        return cls.objects.filter(clocked_time=when).first() or cls(clocked_time=when)

    def __str__(self) -> str:
        when = self.clocked_time
        return str(timezone.localtime(when) if when is not None and timezone.is_aware(when) else when)


class PeriodicTaskQuerySet(models.QuerySet["PeriodicTask"]):
    """Periodic tasks with their schedules."""

    def enabled(self) -> PeriodicTaskQuerySet:
        """The enabled periodic tasks."""
        rows: PeriodicTaskQuerySet = self.filter(enabled=True).select_related(*KINDS)
        return rows


class PeriodicTask(models.Model):
    """A task, when it is to be published, and how."""

    name = models.CharField(_("name"), max_length=200, unique=True)
    task = models.CharField(
        _("task"), max_length=200, help_text=_("The registered name, like proj.tasks.import_contacts")
    )
    interval = models.ForeignKey(
        IntervalSchedule, on_delete=models.CASCADE, null=True, blank=True, verbose_name=_("interval")
    )
    crontab = models.ForeignKey(
        CrontabSchedule, on_delete=models.CASCADE, null=True, blank=True, verbose_name=_("crontab")
    )
    solar = models.ForeignKey(
        SolarSchedule, on_delete=models.CASCADE, null=True, blank=True, verbose_name=_("solar event")
    )
    clocked = models.ForeignKey(
        ClockedSchedule, on_delete=models.CASCADE, null=True, blank=True, verbose_name=_("clocked time")
    )
    args = models.TextField(
        _("positional arguments"), blank=True, default="[]", help_text=_('A JSON list, like ["a", 1]')
    )
    kwargs = models.TextField(
        _("keyword arguments"), blank=True, default="{}", help_text=_('A JSON object, like {"name": "value"}')
    )
    queue = models.CharField(
        _("queue"), max_length=200, blank=True, null=True, default=None, help_text=_("Empty: as task_routes say")
    )
    exchange = models.CharField(_("exchange"), max_length=200, blank=True, null=True, default=None)
    routing_key = models.CharField(_("routing key"), max_length=200, blank=True, null=True, default=None)
    headers = models.TextField(_("headers"), blank=True, default="{}", help_text=_("A JSON object, for the message"))
    priority = models.PositiveIntegerField(
        _("priority"), default=None, validators=[MaxValueValidator(255)], blank=True, null=True
    )
    expires = models.DateTimeField(
        _("ends at"), blank=True, null=True, help_text=_("From then on the task is not published any more")
    )
    expire_seconds = models.PositiveIntegerField(
        _("expires after seconds"), blank=True, null=True, help_text=_("A message that waits for longer is not run")
    )
    one_off = models.BooleanField(_("one-off"), default=False, help_text=_("Publish it once, then disable it"))
    start_time = models.DateTimeField(
        _("starts at"), blank=True, null=True, help_text=_("Until then the task is not published")
    )
    enabled = models.BooleanField(_("enabled"), default=True)
    last_run_at = models.DateTimeField(_("last run"), editable=False, blank=True, null=True)
    # Ours: the due time of that run, from which the next one is counted.
    last_due_at = models.DateTimeField(_("last due time"), editable=False, blank=True, null=True)
    total_run_count = models.PositiveIntegerField(_("runs"), default=0, editable=False)
    date_changed = models.DateTimeField(_("last change"), auto_now=True)
    description = models.TextField(_("description"), blank=True)

    objects = PeriodicTaskQuerySet.as_manager()

    class Meta:
        verbose_name = _("periodic task")
        verbose_name_plural = _("periodic tasks")
        ordering = ("name",)

    @property
    def expires_(self) -> Any:
        """The time after which its messages are not run: a datetime, or seconds."""
        return self.expires or self.expire_seconds

    @property
    def scheduler(self) -> Any:
        """The row of the task's interval, crontab, solar event or clocked time."""
        return next((row for field in KINDS if (row := getattr(self, field)) is not None), None)

    @property
    def schedule(self) -> schedules.BaseSchedule:
        """The schedule as beat takes it. Raises: ConfigurationError (ParseException)."""
        if self.scheduler is None:
            raise ConfigurationError("it has no schedule")
        schedule: schedules.BaseSchedule = self.scheduler.schedule
        return schedule

    @property
    def problem(self) -> str:
        """Why beat leaves the task out; empty when it does not."""
        try:
            _ = self.schedule
            for field, json_type in (("args", list), ("kwargs", dict), ("headers", dict)):
                if not isinstance(json.loads(getattr(self, field) or repr(json_type())), json_type):
                    return f"{field} is no JSON {'list' if json_type is list else 'object'}"
        except Exception as error:  # noqa: BLE001 - rows are written by many; whatever one holds is told, and the others go on
            return str(error) or type(error).__name__
        return ""

    def clean(self) -> None:
        """For forms: arguments and headers are JSON of the right kind. Raises: ValidationError."""
        errors: dict[str, object] = {}
        for field, json_type, example in (
            ("args", list, '["a", 1]'),
            ("kwargs", dict, '{"a": 1}'),
            ("headers", dict, "{}"),
        ):
            try:
                parsed = json.loads(getattr(self, field) or example)
            except ValueError as error:
                errors[field] = _("This is no JSON (%(error)s); write it like %(example)s") % {
                    "error": error,
                    "example": example,
                }
                continue
            if not isinstance(parsed, json_type):
                errors[field] = _("Write it like %(example)s") % {"example": example}
        if self.expire_seconds is not None and self.expires:
            errors["expire_seconds"] = NOT_BOTH
        if errors:
            raise ValidationError(errors)

    def validate_unique(self, *args: Any, **options: Any) -> None:
        """Exactly one schedule; a clocked one runs once. Raises: ValidationError."""
        super().validate_unique(*args, **options)
        chosen = [field for field in KINDS if getattr(self, f"{field}_id") is not None]
        if not chosen:
            raise ValidationError(_("Choose an interval, a crontab, a solar event or a clocked time."))
        if len(chosen) > 1:
            raise ValidationError(dict.fromkeys(chosen, _("Choose one of these, and leave the others empty.")))
        if chosen == ["clocked"] and not self.one_off:
            raise ValidationError({"one_off": _("A task at a clocked time runs once: tick one-off.")})

    def save(self, *args: Any, **options: Any) -> None:
        """Store it. Raises: ValidationError."""
        for field in ("exchange", "routing_key", "queue"):
            setattr(self, field, getattr(self, field) or None)
        if not self.enabled:
            # A task that is enabled again begins anew, and does not catch up.
            self.last_run_at = self.last_due_at = None
        if self.expire_seconds is not None and self.expires:
            raise ValidationError(NOT_BOTH)
        self.validate_unique()
        super().save(*args, **options)

    def __str__(self) -> str:
        return f"{self.name}: {self.scheduler or '{no schedule}'}"


def _spec(field: Any) -> str:
    """A field of a crontab as text."""
    if isinstance(field, (str, int)):
        return str(field)
    return ",".join(map(str, sorted(field)))
