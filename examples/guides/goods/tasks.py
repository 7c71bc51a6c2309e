"""Tasks of a reusable Django application."""

from amqtask import shared_task

from .models import Item


@shared_task
def add(x, y):
    return x + y


@shared_task
def count_items():
    return Item.objects.count()


@shared_task
def price(pk, amount):
    Item.objects.filter(pk=pk).update(price=amount)


@shared_task(bind=True)
def limit(self):
    return [self.name, self.request.timelimit[0] if self.request.timelimit else None, str(self.app.timezone)]
