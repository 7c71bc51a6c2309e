"""The shop's configuration."""

from __future__ import annotations

from django.apps import AppConfig


class ShopConfig(AppConfig):
    """The shop."""

    name = "integration.apps.django_site.shop"
    label = "shop"
