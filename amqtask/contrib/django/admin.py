"""The admin of results, periodic tasks and the outbox."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any

from django import forms
from django.contrib import admin, messages
from django.utils import timezone
from django.utils.html import format_html
from django.utils.text import Truncator
from django.utils.translation import gettext_lazy as _
from django.utils.translation import ngettext

from amqtask import states
from amqtask.contrib.django.models import (
    ClockedSchedule,
    CrontabSchedule,
    GroupResult,
    IntervalSchedule,
    OutboxMessage,
    PeriodicTask,
    PeriodicTasks,
    SolarSchedule,
    TaskResult,
)
from amqtask.contrib.django.project import project_app
from amqtask.contrib.django.schedulers import options_of
from amqtask.exceptions import AmqTaskError
from amqtask.ground.plugins import near_names
from amqtask.protocol.option_types import arguments

if TYPE_CHECKING:
    from django.db.models import QuerySet
    from django.http import HttpRequest
    from django.utils.safestring import SafeString


# -- How values are shown in the admin.

if TYPE_CHECKING:
    _Admin = admin.ModelAdmin[Any]
    _Inline = admin.TabularInline[Any, Any]
    _Form = forms.ModelForm[PeriodicTask]
else:
    # These take no type arguments when they run.
    _Admin, _Inline, _Form = admin.ModelAdmin, admin.TabularInline, forms.ModelForm


def moment(value: datetime | None) -> SafeString:
    """A time to the second, in the current time zone."""
    if value is None:
        return format_html("{}", "-")
    local = timezone.localtime(value) if timezone.is_aware(value) else value
    return format_html('<span style="white-space: nowrap">{}</span>', local.strftime("%Y-%m-%d %H:%M:%S"))


def preformatted(text: str) -> SafeString:
    """Text with its lines, wrapped where the page ends."""
    return format_html('<pre style="white-space: pre-wrap; overflow-wrap: anywhere; margin: 0">{}</pre>', text)


def shown(stored: str | None) -> SafeString:
    """JSON on several lines; what is no JSON as it is stored."""
    if stored is None:
        return preformatted("-")
    try:
        return preformatted(json.dumps(json.loads(stored), indent=2, ensure_ascii=False))
    except ValueError:
        return preformatted(stored)


def _time(field: str, description: Any) -> Any:
    """A column with a time, to the second."""

    @admin.display(description=description, ordering=field)
    def column(self: object, row: object) -> SafeString:
        return moment(getattr(row, field))

    return column


def _json(field: str, description: Any) -> Any:
    """A field that is JSON, on several lines."""

    @admin.display(description=description)
    def column(self: object, row: object) -> SafeString:
        return shown(getattr(row, field))

    return column


class LookOnly(_Admin):
    """Nobody adds or changes what programs have stored."""

    show_full_result_count = False

    def has_add_permission(self, request: HttpRequest, obj: object = None) -> bool:
        """Never."""
        return False

    def has_change_permission(self, request: HttpRequest, obj: object = None) -> bool:
        """Never."""
        return False


# -- The outbox in the admin: what waits, what could not be published and why; to be sent again, or to be deleted.

SHORT, LONGEST_SHOWN = 80, 2000


class HasFailed(admin.SimpleListFilter):
    """Rows with an error, or without."""

    title = _("state")
    parameter_name = "failed"

    def lookups(self, request: HttpRequest, model_admin: object) -> list[tuple[str, Any]]:
        """The choices of the filter."""
        return [("no", _("waits for a relay")), ("yes", _("could not be published"))]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        """The rows of the chosen filter."""
        return queryset.filter(error__isnull=self.value() == "no") if self.value() else queryset


@admin.register(OutboxMessage)
class OutboxMessageAdmin(LookOnly):
    """Rows leave by themselves; nobody adds or changes them."""

    list_display = ("task", "created_at", "attempts", "short_error", "retry_at")
    list_filter = (HasFailed, "created_at", "task")
    search_fields = ("task_id", "task", "error")
    fields = (
        "task", "task_id", "created_at", "attempts", "error", "retry_at", "shown_message", "shown_body",
    )  # fmt: skip
    readonly_fields = fields
    actions = ("send_again",)

    def has_send_permission(self, request: HttpRequest) -> bool:
        """Whether the user may have rows sent again: with the right to change them."""
        return request.user.has_perm("amqtask.change_outboxmessage")

    @admin.action(description=_("Send again now"), permissions=["send"])
    def send_again(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        """Make rows due at once, whenever their next attempt was to be."""
        count = queryset.update(retry_at=None)
        notice = ngettext("%d call is due now.", "%d calls are due now.", count) % count
        self.message_user(request, notice, messages.SUCCESS)

    @admin.display(description=_("error"), ordering="error")
    def short_error(self, row: OutboxMessage) -> str | None:
        """The error as the list shows it, shortened."""
        return row.error and Truncator(row.error).chars(SHORT)

    @admin.display(description=_("message"))
    def shown_message(self, row: OutboxMessage) -> SafeString:
        """The message without its body: exchange, routing key, properties, headers."""
        try:
            text = json.dumps(json.loads(row.message), indent=2, ensure_ascii=False)
        except ValueError:
            text = row.message
        return format_html("<pre>{}</pre>", text)

    @admin.display(description=_("body"))
    def shown_body(self, row: OutboxMessage) -> str:
        """The arguments, as they are serialized."""
        return bytes(row.body).decode(errors="replace")[:LONGEST_SHOWN]


# -- Results in the admin: to look at and to delete.

COLORS = {
    states.SUCCESS: "#28723c",
    states.FAILURE: "#a41515",
    states.RETRY: "#8a6100",
    states.REVOKED: "#6b6b6b",
}


@admin.register(TaskResult)
class TaskResultAdmin(LookOnly):
    """The results of tasks."""

    date_hierarchy = "date_done"
    list_display = ("short_id", "task_name", "state", "done", "periodic_task_name", "worker")
    list_filter = ("status", "date_done", "task_name", "periodic_task_name", "worker")
    search_fields = ("task_id", "task_name", "status", "task_args", "task_kwargs")
    fieldsets = (
        (None, {"fields": ("task_id", "task_name", "periodic_task_name", "state", "worker")}),
        (_("Call"), {"fields": ("shown_args", "shown_kwargs")}),
        (_("Result"), {"fields": ("shown_result", "shown_traceback", "shown_meta")}),
        (_("Times"), {"fields": ("created", "started", "done")}),
        (_("Storage"), {"fields": ("content_type", "content_encoding"), "classes": ("collapse",)}),
    )

    @admin.display(description=_("task id"), ordering="task_id")
    def short_id(self, result: TaskResult) -> SafeString:
        """The beginning of the id; the whole id when the mouse is over it."""
        return format_html('<span title="{}">{}</span>', result.task_id, result.task_id[:8])

    created = _time("date_created", _("created"))
    started = _time("date_started", _("started"))
    done = _time("date_done", _("last change"))

    @admin.display(description=_("state"), ordering="status")
    def state(self, result: TaskResult) -> SafeString:
        """The state, in its colour."""
        color = COLORS.get(result.status, "inherit")
        return format_html('<span style="color: {}; font-weight: 600">{}</span>', color, result.status)

    shown_args = _json("task_args", _("positional arguments"))
    shown_kwargs = _json("task_kwargs", _("keyword arguments"))
    shown_result = _json("result", _("result"))

    @admin.display(description=_("traceback"))
    def shown_traceback(self, result: TaskResult) -> SafeString:
        """The worker's traceback."""
        return preformatted(result.traceback or "-")

    shown_meta = _json("meta", _("children and more"))


@admin.register(GroupResult)
class GroupResultAdmin(LookOnly):
    """Saved groups."""

    date_hierarchy = "date_done"
    list_display = ("group_id", "date_done")
    list_filter = ("date_done",)
    search_fields = ("group_id",)
    fields = ("group_id", "shown_members", "date_created", "date_done", "content_type", "content_encoding")

    shown_members = _json("result", _("members"))


# -- Periodic tasks and their schedules in the admin: create, change, enable, disable, run now.


class NameOrOther(forms.TextInput):
    """A line of text that proposes names."""

    template_name = "amqtask/name_or_other.html"

    def get_context(self, name: str, value: object, attrs: dict[str, object] | None) -> dict[str, Any]:
        """The widget's context, with the names of the tasks that this process knows."""
        context = super().get_context(name, value, attrs)
        proposals = f"id_{name}_names"
        context["widget"]["attrs"]["list"] = proposals
        return {**context, "proposals": proposals, "names": registered_tasks()}


class PeriodicTaskForm(_Form):
    """A periodic task; names of tasks are proposed, and one that is nearly one of them is taken for a slip."""

    is_elsewhere = forms.BooleanField(
        label=_("registered elsewhere"),
        required=False,
        help_text=_("Tick it when only other programs know this task"),
    )

    class Meta:
        model = PeriodicTask
        exclude = ()
        widgets = {  # noqa: RUF012 - as Django's documentation has it
            "task": NameOrOther(attrs={"class": "vTextField", "autocomplete": "off"}),
            "args": forms.Textarea(attrs={"rows": 2, "cols": 60}),
            "kwargs": forms.Textarea(attrs={"rows": 2, "cols": 60}),
            "headers": forms.Textarea(attrs={"rows": 2, "cols": 60}),
            "description": forms.Textarea(attrs={"rows": 3, "cols": 60}),
        }

    def clean(self) -> dict[str, Any]:
        """Raises: ValidationError."""
        cleaned: dict[str, Any] = super().clean() or self.cleaned_data
        name, names = cleaned.get("task"), registered_tasks()
        if name and name not in names and not cleaned.get("is_elsewhere"):
            near = near_names(name, names, alike=0.8)
            if near:
                text = _("No task %(name)r is registered. Is %(near)r meant? (Or tick “registered elsewhere”.)")
                self.add_error("task", text % {"name": name, "near": near[0]})
        return cleaned


@admin.register(PeriodicTask)
class PeriodicTaskAdmin(_Admin):
    """What beat publishes."""

    form = PeriodicTaskForm
    list_display = ("name", "enabled", "timing", "last_run", "total_run_count", "task", "one_off")
    list_filter = ("enabled", "one_off", "task", "last_run_at")
    search_fields = ("name", "task", "description")
    list_select_related = ("interval", "crontab", "solar", "clocked")
    actions = ("enable", "disable", "run_now")
    readonly_fields = ("last_run", "total_run_count", "last_change")
    fieldsets = (
        (None, {"fields": ("name", "task", "is_elsewhere", "enabled", "description")}),
        (
            _("When: choose one"),
            {"fields": ("interval", "crontab", "solar", "clocked", "one_off", "start_time", "expires")},
        ),
        (_("Arguments"), {"fields": ("args", "kwargs")}),
        (
            _("Message"),
            {
                "fields": ("queue", "exchange", "routing_key", "priority", "expire_seconds", "headers"),
                "classes": ("collapse",),
            },
        ),
        (_("Runs"), {"fields": ("last_run", "total_run_count", "last_change")}),
    )

    @admin.display(description=_("schedule"))
    def timing(self, periodic: PeriodicTask) -> str:
        """The task's interval, crontab, solar event or clocked time, and what keeps beat from using it."""
        timing = str(periodic.scheduler or "-")
        return f"⚠ {timing}: {problem}" if (problem := periodic.problem) else timing

    last_run = _time("last_run_at", _("last run"))
    last_change = _time("date_changed", _("last change"))

    def save_model(self, request: HttpRequest, obj: PeriodicTask, form: object, change: bool) -> None:
        """Save the periodic task; warn when this process knows no task of that name."""
        super().save_model(request, obj, form, change)
        names = registered_tasks()
        if names and obj.task not in names:
            text = _("No task %(name)r is registered in this process: a worker must have it, or it fails there.")
            messages.warning(request, text % {"name": obj.task})

    @admin.action(description=_("Enable selected periodic tasks"), permissions=["change"])
    def enable(self, request: HttpRequest, queryset: QuerySet[PeriodicTask]) -> None:
        """Enable periodic tasks: beat publishes them."""
        count = queryset.update(enabled=True)
        PeriodicTasks.update_changed()
        text = ngettext("%d periodic task is enabled.", "%d periodic tasks are enabled.", count)
        self.message_user(request, text % count, messages.SUCCESS)

    @admin.action(description=_("Disable selected periodic tasks"), permissions=["change"])
    def disable(self, request: HttpRequest, queryset: QuerySet[PeriodicTask]) -> None:
        """Disable periodic tasks: beat leaves them out."""
        count = queryset.update(enabled=False, last_run_at=None, last_due_at=None)
        PeriodicTasks.update_changed()
        text = ngettext("%d periodic task is disabled.", "%d periodic tasks are disabled.", count)
        self.message_user(request, text % count, messages.SUCCESS)

    @admin.action(description=_("Run selected periodic tasks now"), permissions=["change"])
    def run_now(self, request: HttpRequest, queryset: QuerySet[PeriodicTask]) -> None:
        """Publish each once, confirmed by the broker; when they are due next stays as it is."""
        sent = 0
        for periodic in queryset:
            try:
                args, kwargs = json.loads(periodic.args or "[]"), json.loads(periodic.kwargs or "{}")
                call = (periodic.task, *arguments(periodic.task, args, kwargs), options_of(periodic))
                project_app().caller.publish_call(*call, refuses_held=True)
            except (AmqTaskError, TypeError, ValueError) as error:
                text = _("Periodic task “%(name)s” was not published: %(error)s")
                self.message_user(request, text % {"name": periodic.name, "error": error}, messages.ERROR)
            else:
                sent += 1
        if sent:
            done = ngettext("%d periodic task was published.", "%d periodic tasks were published.", sent)
            self.message_user(request, done % sent, messages.SUCCESS)


class UsedBy(_Inline):
    """The periodic tasks that have this schedule."""

    model = PeriodicTask
    fields = ("name", "task", "enabled", "last_run_at")
    readonly_fields = fields
    can_delete = False
    show_change_link = True
    extra = 0
    verbose_name_plural = _("periodic tasks with this schedule")

    def has_add_permission(self, request: HttpRequest, obj: object = None) -> bool:
        """Never: periodic tasks are added in their own form, which has all fields."""
        return False


@admin.register(IntervalSchedule, SolarSchedule, ClockedSchedule)
class TimingAdmin(_Admin):
    """Schedules, and who uses them."""

    inlines = (UsedBy,)


@admin.register(CrontabSchedule)
class CrontabAdmin(TimingAdmin):
    """Schedules like cron's, field by field."""

    list_display = ("__str__", "minute", "hour", "day_of_month", "month_of_year", "day_of_week", "timezone")
    fields = ("minute", "hour", "day_of_month", "month_of_year", "day_of_week", "timezone")


def registered_tasks() -> list[str]:
    """The tasks of the project's application, in order; none if there is no application."""
    try:
        app = project_app()
    except AmqTaskError:
        return []
    app.load_tasks()
    return app.tasks.own
