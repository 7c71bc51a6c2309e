"""`celery.loaders.app`."""

from __future__ import annotations

from amqtask.compat.loaders.base import BaseLoader

__all__ = ["AppLoader"]


class AppLoader(BaseLoader):
    """What an application has when it names no other."""
