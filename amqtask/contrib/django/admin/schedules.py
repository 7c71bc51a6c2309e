"""Periodic tasks and their schedules in the admin: create, change, enable, disable, run now."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from django import forms
from django.contrib import admin, messages
from django.utils.translation import gettext_lazy as _
from django.utils.translation import ngettext

from amqtask.contrib.django.admin.text import moment
from amqtask.contrib.django.models import (
    ClockedSchedule,
    CrontabSchedule,
    IntervalSchedule,
    PeriodicTask,
    PeriodicTasks,
    SolarSchedule,
)
from amqtask.contrib.django.project import project_app
from amqtask.contrib.django.sending import options_of
from amqtask.exceptions import AmqTaskError
from amqtask.ground.plugins import near_names

if TYPE_CHECKING:
    from django.db.models import QuerySet
    from django.http import HttpRequest
    from django.utils.safestring import SafeString

    _Admin = admin.ModelAdmin[Any]
    _Inline = admin.TabularInline[Any, Any]
    _Form = forms.ModelForm[PeriodicTask]
else:
    # These take no type arguments when they run.
    _Admin, _Inline, _Form = admin.ModelAdmin, admin.TabularInline, forms.ModelForm


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

    @admin.display(description=_("last run"), ordering="last_run_at")
    def last_run(self, periodic: PeriodicTask) -> SafeString:
        """The time, to the second."""
        return moment(periodic.last_run_at)

    @admin.display(description=_("last change"), ordering="date_changed")
    def last_change(self, periodic: PeriodicTask) -> SafeString:
        """The time, to the second."""
        return moment(periodic.date_changed)

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
                project_app().send_task(periodic.task, args, kwargs, **options_of(periodic))
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
    app.import_modules()
    app.finalize()
    return app.tasks.own
