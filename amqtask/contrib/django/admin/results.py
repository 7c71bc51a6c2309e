"""Results in the admin: to look at and to delete."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from django.contrib import admin
from django.utils.html import format_html
from django.utils.translation import gettext_lazy as _

from amqtask import states
from amqtask.contrib.django.admin.text import moment, preformatted
from amqtask.contrib.django.models import GroupResult, TaskResult

if TYPE_CHECKING:
    from django.http import HttpRequest
    from django.utils.safestring import SafeString

    _Admin = admin.ModelAdmin[Any]
else:
    _Admin = admin.ModelAdmin  # takes no type arguments when it runs

COLORS = {
    states.SUCCESS: "#28723c",
    states.FAILURE: "#a41515",
    states.RETRY: "#8a6100",
    states.REVOKED: "#6b6b6b",
}


class LookOnly(_Admin):
    """Nobody adds or changes what workers have stored."""

    show_full_result_count = False

    def has_add_permission(self, request: HttpRequest, obj: object = None) -> bool:
        """Never."""
        return False

    def has_change_permission(self, request: HttpRequest, obj: object = None) -> bool:
        """Never."""
        return False


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

    @admin.display(description=_("created"), ordering="date_created")
    def created(self, result: TaskResult) -> SafeString:
        """The time, to the second."""
        return moment(result.date_created)

    @admin.display(description=_("started"), ordering="date_started")
    def started(self, result: TaskResult) -> SafeString:
        """The time, to the second."""
        return moment(result.date_started)

    @admin.display(description=_("last change"), ordering="date_done")
    def done(self, result: TaskResult) -> SafeString:
        """The time, to the second."""
        return moment(result.date_done)

    @admin.display(description=_("state"), ordering="status")
    def state(self, result: TaskResult) -> SafeString:
        """The state, in its colour."""
        color = COLORS.get(result.status, "inherit")
        return format_html('<span style="color: {}; font-weight: 600">{}</span>', color, result.status)

    @admin.display(description=_("positional arguments"))
    def shown_args(self, result: TaskResult) -> SafeString:
        """The field as JSON, on several lines."""
        return shown(result.task_args)

    @admin.display(description=_("keyword arguments"))
    def shown_kwargs(self, result: TaskResult) -> SafeString:
        """The field as JSON, on several lines."""
        return shown(result.task_kwargs)

    @admin.display(description=_("result"))
    def shown_result(self, result: TaskResult) -> SafeString:
        """The field as JSON, on several lines."""
        return shown(result.result)

    @admin.display(description=_("traceback"))
    def shown_traceback(self, result: TaskResult) -> SafeString:
        """The worker's traceback."""
        return preformatted(result.traceback or "-")

    @admin.display(description=_("children and more"))
    def shown_meta(self, result: TaskResult) -> SafeString:
        """The field as JSON, on several lines."""
        return shown(result.meta)


@admin.register(GroupResult)
class GroupResultAdmin(LookOnly):
    """Saved groups."""

    date_hierarchy = "date_done"
    list_display = ("group_id", "date_done")
    list_filter = ("date_done",)
    search_fields = ("group_id",)
    fields = ("group_id", "shown_members", "date_created", "date_done", "content_type", "content_encoding")

    @admin.display(description=_("members"))
    def shown_members(self, result: GroupResult) -> SafeString:
        """The field as JSON, on several lines."""
        return shown(result.result)


def shown(stored: str | None) -> SafeString:
    """JSON on several lines; what is no JSON as it is stored."""
    if stored is None:
        return preformatted("-")
    try:
        return preformatted(json.dumps(json.loads(stored), indent=2, ensure_ascii=False))
    except ValueError:
        return preformatted(stored)
