"""A shop with an outbox, on Django: an order (a group of users) and the call that ships it are one transaction."""

from __future__ import annotations

import os
import time

import django

from amqtask import AmqTask
from integration.apps.outbox_journal import Failed

os.environ["DJANGO_SETTINGS_MODULE"] = "integration.apps.django_site.settings"
os.environ["SITE_DATABASE"] = os.environ["SHOP_DATABASE"]
django.setup()

from django.contrib.auth.models import Group  # noqa: E402 - Django is set up first
from django.core.management import call_command  # noqa: E402
from django.db import transaction  # noqa: E402

app = AmqTask("shop", task_default_queue=os.environ.get("SHOP_QUEUE", "shop"), outbox=True)


@app.task(name="shop.ship")
def ship(order: str) -> str:
    """What an order leads to."""
    return order


def prepare() -> None:
    """Make the tables."""
    call_command("migrate", verbosity=0)


def order(task_id: str, end: str, pause: float) -> None:
    """One transaction, which ends as told: commit, rollback or fail."""
    with transaction.atomic():
        Group.objects.create(name=task_id)
        time.sleep(pause / 2)
        ship.apply_async((task_id,), task_id=task_id)
        time.sleep(pause / 2)
        if end == "fail":
            raise Failed
        if end == "rollback":
            transaction.set_rollback(True)


def ordered() -> set[str]:
    """The orders that were committed."""
    return set(Group.objects.values_list("name", flat=True))
