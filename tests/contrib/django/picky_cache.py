"""Caches of Django's that do not keep what is large: one raises, as memcached's clients do, and one says nothing."""

from __future__ import annotations

from typing import Any

from django.core.cache.backends.locmem import LocMemCache

LARGEST = 1000


class Raises(LocMemCache):
    def set(self, key: Any, value: Any, *options: Any, **more: Any) -> None:
        self._look_at(value)
        super().set(key, value, *options, **more)

    def add(self, key: Any, value: Any, *options: Any, **more: Any) -> bool:
        self._look_at(value)
        return bool(super().add(key, value, *options, **more))

    def _look_at(self, value: Any) -> None:
        if len(repr(value)) > LARGEST:
            raise ValueError("SERVER_ERROR object too large for cache")


class SaysNothing(LocMemCache):
    def add(self, key: Any, value: Any, *options: Any, **more: Any) -> bool:
        return len(repr(value)) <= LARGEST and bool(super().add(key, value, *options, **more))


class IsAway(LocMemCache):
    """As django-redis with DJANGO_REDIS_IGNORE_EXCEPTIONS."""

    def set(self, key: Any, value: Any, *options: Any, **more: Any) -> None: ...

    def add(self, key: Any, value: Any, *options: Any, **more: Any) -> bool:
        return False
