"""How values are shown in the admin."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from django.utils import timezone
from django.utils.html import format_html

if TYPE_CHECKING:
    from django.utils.safestring import SafeString


def moment(value: datetime | None) -> SafeString:
    """A time to the second, in the current time zone."""
    if value is None:
        return format_html("{}", "-")
    local = timezone.localtime(value) if timezone.is_aware(value) else value
    return format_html('<span style="white-space: nowrap">{}</span>', local.strftime("%Y-%m-%d %H:%M:%S"))


def preformatted(text: str) -> SafeString:
    """Text with its lines, wrapped where the page ends."""
    return format_html('<pre style="white-space: pre-wrap; overflow-wrap: anywhere; margin: 0">{}</pre>', text)
