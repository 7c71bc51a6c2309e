"""What the pages say nothing of, and what docs/outbox.md says."""

from __future__ import annotations

from pathlib import Path

SECRET_KEY = "for tests only"
DEBUG = USE_TZ = True
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": Path(__file__).parent.parent / "db.sqlite3"}}
INSTALLED_APPS = ["django.contrib.contenttypes", "amqtask.contrib.django"]
CELERY_OUTBOX = True
