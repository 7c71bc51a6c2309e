"""As docs/django.md has it."""

from __future__ import annotations

import os

from amqtask import AmqTask

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "proj.settings")

app = AmqTask("proj")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
