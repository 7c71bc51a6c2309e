"""Settings of the test project: an in-memory SQLite unless SITE_DATABASE (a URL) names a PostgreSQL."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any
from urllib.parse import unquote, urlsplit


def database(url: str | None) -> dict[str, Any]:
    """Django's description of `postgresql://user:password@host:port/name`."""
    if not url:
        return {"ENGINE": "django.db.backends.sqlite3", "NAME": os.environ.get("SITE_SQLITE", ":memory:")}
    parts = urlsplit(url)
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": parts.path.lstrip("/"),
        "USER": unquote(parts.username or ""),
        "PASSWORD": unquote(parts.password or ""),
        "HOST": parts.hostname or "",
        "PORT": str(parts.port or ""),
    }


CELERY_RESULT_BACKEND = "django-db"
CELERY_RESULT_EXTENDED = True
CELERY_TASK_TRACK_STARTED = True
HAS_TASKS = find_spec("django.tasks") or find_spec("django_tasks")
CELERY_IMPORTS = ["integration.apps.django_site.shop.jobs"] if HAS_TASKS else []
CELERY_TASK_DEFAULT_QUEUE = os.environ.get("SITE_QUEUE", "site")

SECRET_KEY = "for tests only"
USE_TZ = True
TIME_ZONE = "Europe/Berlin"
DATABASES = {
    "default": {
        **database(os.environ.get("SITE_DATABASE")),
        "CONN_MAX_AGE": int(os.environ.get("SITE_AGE", "0")),
        # A connection pool for each process, or none.
        "OPTIONS": {"pool": {"min_size": 1, "max_size": 2}} if os.environ.get("SITE_POOL") else {},
    }
}
CACHES = {
    "default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"},
    "redis": {
        "BACKEND": "django.core.cache.backends.redis.RedisCache",
        "LOCATION": os.environ.get("SITE_REDIS", "redis://127.0.0.1:6379/0"),
    },
    "files": {
        "BACKEND": "django.core.cache.backends.filebased.FileBasedCache",
        "LOCATION": os.environ.get("SITE_CACHE", ""),
        "OPTIONS": {"MAX_ENTRIES": 10_000},
    },
}
INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "amqtask.contrib.django",
    "integration.apps.django_site.shop.apps.ShopConfig",
    # Before Django 6, where tasks are a part of Django itself.
    *(["django_tasks"] if find_spec("django_tasks") and not find_spec("django.tasks") else []),
]
TASKS = {
    "default": {
        "BACKEND": "amqtask.contrib.django.tasks.AmqTaskBackend",
        "QUEUES": ["default", "slow"],
        "OPTIONS": {"autoretry_for": (ConnectionError,), "default_retry_delay": 0, "retry_jitter": False},
    },
    "other": {"BACKEND": "amqtask.contrib.django.tasks.AmqTaskBackend", "QUEUES": []},
}
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
ROOT_URLCONF = "integration.apps.django_site.urls"
