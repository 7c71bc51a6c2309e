"""The outbox in the admin: what waits, what could not be published and why; to be sent again, or to be deleted."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from django.contrib import admin, messages
from django.utils.html import format_html
from django.utils.text import Truncator
from django.utils.translation import gettext_lazy as _
from django.utils.translation import ngettext

from amqtask.contrib.django.models import OutboxMessage

if TYPE_CHECKING:
    from django.db.models import QuerySet
    from django.http import HttpRequest
    from django.utils.safestring import SafeString

    _Admin = admin.ModelAdmin[Any]
else:
    _Admin = admin.ModelAdmin  # takes no type arguments when it runs

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
class OutboxMessageAdmin(_Admin):
    """Rows leave by themselves; nobody adds or changes them."""

    list_display = ("task", "created_at", "attempts", "short_error", "retry_at")
    list_filter = (HasFailed, "created_at", "task")
    search_fields = ("task_id", "task", "error")
    fields = (
        "task", "task_id", "created_at", "attempts", "error", "retry_at", "shown_message", "shown_body",
    )  # fmt: skip
    readonly_fields = fields
    actions = ("send_again",)
    show_full_result_count = False

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Never: calls add rows."""
        return False

    def has_change_permission(self, request: HttpRequest, obj: object = None) -> bool:
        """Never: a row is sent as the call has made it."""
        return False

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
