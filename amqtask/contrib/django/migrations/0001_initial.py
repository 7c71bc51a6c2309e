"""The tables of results and of periodic tasks."""

import django.core.validators
import django.db.models.deletion
from django.db import migrations, models

import amqtask.contrib.django.zones


class Migration(migrations.Migration):
    initial = True

    dependencies = []

    operations = [
        migrations.CreateModel(
            name="ClockedSchedule",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("clocked_time", models.DateTimeField(verbose_name="time")),
            ],
            options={
                "verbose_name": "clocked time",
                "verbose_name_plural": "clocked times",
                "ordering": ("clocked_time",),
            },
        ),
        migrations.CreateModel(
            name="CrontabSchedule",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                (
                    "minute",
                    models.CharField(
                        default="*",
                        help_text='"*" for all, or like "0,30" or "*/5"',
                        max_length=240,
                        verbose_name="minutes",
                    ),
                ),
                (
                    "hour",
                    models.CharField(
                        default="*", help_text='"*" for all, or like "8-17"', max_length=96, verbose_name="hours"
                    ),
                ),
                (
                    "day_of_month",
                    models.CharField(
                        default="*",
                        help_text='"*" for all, or like "1,15"',
                        max_length=124,
                        verbose_name="days of the month",
                    ),
                ),
                (
                    "month_of_year",
                    models.CharField(
                        default="*",
                        help_text='"*" for all, or like "1,7" or "jan,jul"',
                        max_length=64,
                        verbose_name="months",
                    ),
                ),
                (
                    "day_of_week",
                    models.CharField(
                        default="*",
                        help_text='"*" for all, or like "mon-fri"; 0 is Sunday',
                        max_length=64,
                        verbose_name="days of the week",
                    ),
                ),
                (
                    "timezone",
                    amqtask.contrib.django.zones.TimeZoneField(
                        default=amqtask.contrib.django.zones.default_zone, max_length=63, verbose_name="time zone"
                    ),
                ),
            ],
            options={
                "verbose_name": "crontab",
                "verbose_name_plural": "crontabs",
                "ordering": ("month_of_year", "day_of_month", "day_of_week", "hour", "minute", "timezone"),
            },
        ),
        migrations.CreateModel(
            name="IntervalSchedule",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                (
                    "every",
                    models.IntegerField(
                        validators=[django.core.validators.MinValueValidator(1)], verbose_name="number of periods"
                    ),
                ),
                (
                    "period",
                    models.CharField(
                        choices=[
                            ("days", "Days"),
                            ("hours", "Hours"),
                            ("minutes", "Minutes"),
                            ("seconds", "Seconds"),
                            ("microseconds", "Microseconds"),
                        ],
                        max_length=24,
                        verbose_name="period",
                    ),
                ),
            ],
            options={
                "verbose_name": "interval",
                "verbose_name_plural": "intervals",
                "ordering": ("period", "every"),
            },
        ),
        migrations.CreateModel(
            name="PeriodicTasks",
            fields=[
                ("ident", models.SmallIntegerField(default=1, primary_key=True, serialize=False, unique=True)),
                ("last_update", models.DateTimeField()),
            ],
            options={
                "verbose_name": "change of periodic tasks",
                "verbose_name_plural": "changes of periodic tasks",
            },
        ),
        migrations.CreateModel(
            name="GroupResult",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("group_id", models.CharField(max_length=255, unique=True, verbose_name="group id")),
                ("date_created", models.DateTimeField(auto_now_add=True, verbose_name="created")),
                ("date_done", models.DateTimeField(auto_now=True, verbose_name="last change")),
                ("content_type", models.CharField(max_length=128, verbose_name="content type")),
                ("content_encoding", models.CharField(max_length=64, verbose_name="encoding")),
                ("result", models.TextField(default=None, editable=False, null=True, verbose_name="members")),
            ],
            options={
                "verbose_name": "group result",
                "verbose_name_plural": "group results",
                "ordering": ("-date_done",),
                "indexes": [
                    models.Index(fields=["date_created"], name="amqtask_group_created_idx"),
                    models.Index(fields=["date_done"], name="amqtask_group_done_idx"),
                ],
            },
        ),
        migrations.CreateModel(
            name="SolarSchedule",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                (
                    "event",
                    models.CharField(
                        choices=[
                            ("dawn_astronomical", "Astronomical dawn"),
                            ("dawn_civil", "Civil dawn"),
                            ("dawn_nautical", "Nautical dawn"),
                            ("dusk_astronomical", "Astronomical dusk"),
                            ("dusk_civil", "Civil dusk"),
                            ("dusk_nautical", "Nautical dusk"),
                            ("solar_noon", "Solar noon"),
                            ("sunrise", "Sunrise"),
                            ("sunset", "Sunset"),
                        ],
                        max_length=24,
                        verbose_name="event",
                    ),
                ),
                (
                    "latitude",
                    models.DecimalField(
                        decimal_places=6,
                        max_digits=9,
                        validators=[
                            django.core.validators.MinValueValidator(-90),
                            django.core.validators.MaxValueValidator(90),
                        ],
                        verbose_name="latitude",
                    ),
                ),
                (
                    "longitude",
                    models.DecimalField(
                        decimal_places=6,
                        max_digits=9,
                        validators=[
                            django.core.validators.MinValueValidator(-180),
                            django.core.validators.MaxValueValidator(180),
                        ],
                        verbose_name="longitude",
                    ),
                ),
            ],
            options={
                "verbose_name": "solar event",
                "verbose_name_plural": "solar events",
                "ordering": ("event", "latitude", "longitude"),
                "unique_together": {("event", "latitude", "longitude")},
            },
        ),
        migrations.CreateModel(
            name="PeriodicTask",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("name", models.CharField(max_length=200, unique=True, verbose_name="name")),
                (
                    "task",
                    models.CharField(
                        help_text="The registered name, like proj.tasks.import_contacts",
                        max_length=200,
                        verbose_name="task",
                    ),
                ),
                (
                    "args",
                    models.TextField(
                        blank=True,
                        default="[]",
                        help_text='A JSON list, like ["a", 1]',
                        verbose_name="positional arguments",
                    ),
                ),
                (
                    "kwargs",
                    models.TextField(
                        blank=True,
                        default="{}",
                        help_text='A JSON object, like {"name": "value"}',
                        verbose_name="keyword arguments",
                    ),
                ),
                (
                    "queue",
                    models.CharField(
                        blank=True,
                        default=None,
                        help_text="Empty: as task_routes say",
                        max_length=200,
                        null=True,
                        verbose_name="queue",
                    ),
                ),
                (
                    "exchange",
                    models.CharField(blank=True, default=None, max_length=200, null=True, verbose_name="exchange"),
                ),
                (
                    "routing_key",
                    models.CharField(blank=True, default=None, max_length=200, null=True, verbose_name="routing key"),
                ),
                (
                    "headers",
                    models.TextField(
                        blank=True, default="{}", help_text="A JSON object, for the message", verbose_name="headers"
                    ),
                ),
                (
                    "priority",
                    models.PositiveIntegerField(
                        blank=True,
                        default=None,
                        null=True,
                        validators=[django.core.validators.MaxValueValidator(255)],
                        verbose_name="priority",
                    ),
                ),
                (
                    "expires",
                    models.DateTimeField(
                        blank=True,
                        help_text="From then on the task is not published any more",
                        null=True,
                        verbose_name="ends at",
                    ),
                ),
                (
                    "expire_seconds",
                    models.PositiveIntegerField(
                        blank=True,
                        help_text="A message that waits for longer is not run",
                        null=True,
                        verbose_name="expires after seconds",
                    ),
                ),
                (
                    "one_off",
                    models.BooleanField(
                        default=False, help_text="Publish it once, then disable it", verbose_name="one-off"
                    ),
                ),
                (
                    "start_time",
                    models.DateTimeField(
                        blank=True,
                        help_text="Until then the task is not published",
                        null=True,
                        verbose_name="starts at",
                    ),
                ),
                ("enabled", models.BooleanField(default=True, verbose_name="enabled")),
                ("last_run_at", models.DateTimeField(blank=True, editable=False, null=True, verbose_name="last run")),
                (
                    "last_due_at",
                    models.DateTimeField(blank=True, editable=False, null=True, verbose_name="last due time"),
                ),
                ("total_run_count", models.PositiveIntegerField(default=0, editable=False, verbose_name="runs")),
                ("date_changed", models.DateTimeField(auto_now=True, verbose_name="last change")),
                ("description", models.TextField(blank=True, verbose_name="description")),
                (
                    "clocked",
                    models.ForeignKey(
                        blank=True,
                        null=True,
                        on_delete=django.db.models.deletion.CASCADE,
                        to="amqtask.clockedschedule",
                        verbose_name="clocked time",
                    ),
                ),
                (
                    "crontab",
                    models.ForeignKey(
                        blank=True,
                        null=True,
                        on_delete=django.db.models.deletion.CASCADE,
                        to="amqtask.crontabschedule",
                        verbose_name="crontab",
                    ),
                ),
                (
                    "interval",
                    models.ForeignKey(
                        blank=True,
                        null=True,
                        on_delete=django.db.models.deletion.CASCADE,
                        to="amqtask.intervalschedule",
                        verbose_name="interval",
                    ),
                ),
                (
                    "solar",
                    models.ForeignKey(
                        blank=True,
                        null=True,
                        on_delete=django.db.models.deletion.CASCADE,
                        to="amqtask.solarschedule",
                        verbose_name="solar event",
                    ),
                ),
            ],
            options={
                "verbose_name": "periodic task",
                "verbose_name_plural": "periodic tasks",
                "ordering": ("name",),
            },
        ),
        migrations.CreateModel(
            name="TaskResult",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("task_id", models.CharField(max_length=255, unique=True, verbose_name="task id")),
                (
                    "periodic_task_name",
                    models.CharField(
                        help_text="The periodic task that published it",
                        max_length=255,
                        null=True,
                        verbose_name="periodic task",
                    ),
                ),
                ("task_name", models.CharField(max_length=255, null=True, verbose_name="task")),
                ("task_args", models.TextField(null=True, verbose_name="positional arguments")),
                ("task_kwargs", models.TextField(null=True, verbose_name="keyword arguments")),
                ("status", models.CharField(default="PENDING", max_length=50, verbose_name="state")),
                ("worker", models.CharField(default=None, max_length=100, null=True, verbose_name="worker")),
                ("content_type", models.CharField(max_length=128, verbose_name="content type")),
                ("content_encoding", models.CharField(max_length=64, verbose_name="encoding")),
                ("result", models.TextField(default=None, editable=False, null=True, verbose_name="result")),
                ("date_created", models.DateTimeField(auto_now_add=True, verbose_name="created")),
                ("date_started", models.DateTimeField(default=None, null=True, verbose_name="started")),
                ("date_done", models.DateTimeField(auto_now=True, verbose_name="last change")),
                ("traceback", models.TextField(blank=True, null=True, verbose_name="traceback")),
                ("meta", models.TextField(default=None, editable=False, null=True, verbose_name="children and more")),
            ],
            options={
                "verbose_name": "task result",
                "verbose_name_plural": "task results",
                "ordering": ("-date_done",),
                "indexes": [
                    models.Index(fields=["task_name"], name="amqtask_result_name_idx"),
                    models.Index(fields=["status"], name="amqtask_result_status_idx"),
                    models.Index(fields=["worker"], name="amqtask_result_worker_idx"),
                    models.Index(fields=["date_created"], name="amqtask_result_created_idx"),
                    models.Index(fields=["date_done"], name="amqtask_result_done_idx"),
                    models.Index(fields=["periodic_task_name"], name="amqtask_result_periodic_idx"),
                ],
            },
        ),
    ]
