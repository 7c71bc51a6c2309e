"""Results of tasks and of groups, in the columns of django-celery-results (django_celery_results/models.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from django.db import models
from django.utils.translation import gettext_lazy as _

from amqtask import states

if TYPE_CHECKING:
    from amqtask.ground.shapes import JsonObject

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
