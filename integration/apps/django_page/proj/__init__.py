"""The Django project that the how-to pages speak of (integration/test_pages.py)."""

from .celery import app as celery_app

__all__ = ("celery_app",)
