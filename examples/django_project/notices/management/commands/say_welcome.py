import json

from django.core.management.base import BaseCommand

from amqtask.contrib.django.models import IntervalSchedule, PeriodicTask


class Command(BaseCommand):
    help = "Have everybody named on the command line welcomed every other second."

    def add_arguments(self, parser):
        parser.add_argument("names", nargs="+")

    def handle(self, *args, names, **options):
        scheduler, _created = IntervalSchedule.objects.get_or_create(every=2, period=IntervalSchedule.SECONDS)
        for name in names:
            PeriodicTask.objects.get_or_create(
                name=f"say welcome to {name}",
                defaults={"interval": scheduler, "task": "notices.tasks.welcome", "args": json.dumps([name])},
            )
