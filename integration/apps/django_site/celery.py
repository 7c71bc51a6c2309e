"""Its AmqTask application, as a Django project has it."""

from __future__ import annotations

import os

from amqtask import AmqTask

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "integration.apps.django_site.settings")

app = AmqTask("site")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
