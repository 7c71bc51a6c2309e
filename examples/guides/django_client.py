"""Django: shared tasks, a database, calls that leave when the transaction is committed."""

import json
import time

import django

import shop  # noqa: F401 - the application, as Django's own start-up finds it

django.setup()

from django.db import connection, transaction  # noqa: E402
from goods.models import Item  # noqa: E402
from goods.tasks import add, count_items, limit, price  # noqa: E402


def main():
    found = {}
    with connection.schema_editor() as editor:
        editor.create_model(Item)
    found["shared"] = add.delay(2, 3).get(timeout=30)
    found["empty"] = count_items.delay().get(timeout=30)
    with transaction.atomic():
        item = Item.objects.create(name="tea")
        found["on commit"] = price.delay_on_commit(item.pk, 5)
        found["not yet"] = Item.objects.get(pk=item.pk).price
    try:
        with transaction.atomic():
            price.delay_on_commit(item.pk, 99)
            raise KeyError("rolled back")
    except KeyError:
        found["rolled back"] = True
    end = time.monotonic() + 30
    while not Item.objects.get(pk=item.pk).price and time.monotonic() < end:
        time.sleep(0.05)
    found["price"] = Item.objects.get(pk=item.pk).price
    found["one"] = count_items.delay().get(timeout=30)
    found["settings"] = limit.delay().get(timeout=30)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
