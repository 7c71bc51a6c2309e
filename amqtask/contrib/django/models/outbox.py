"""Calls that wait for a relay: the transactional outbox (docs/outbox.md)."""

from __future__ import annotations

from django.db import models
from django.utils import timezone
from django.utils.translation import gettext_lazy as _


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
