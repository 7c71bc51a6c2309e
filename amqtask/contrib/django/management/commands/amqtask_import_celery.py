"""`manage.py amqtask_import_celery`: periodic tasks and results of django-celery-beat and django-celery-results."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandParser
from django.db import DEFAULT_DB_ALIAS

from amqtask.contrib.django.importing import Import


class Command(BaseCommand):
    """Copies rows, as often as it is asked to; nothing is deleted or overwritten."""

    help = (
        "Copy the tables of django-celery-beat and django-celery-results into amqtask's; run it as often as you like."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        """Which database, and whether to copy at all."""
        parser.add_argument("--database", default=DEFAULT_DB_ALIAS, help="The database that has both (default).")
        parser.add_argument("--dry-run", action="store_true", help="Only say what would be copied.")

    def handle(self, *args: object, **options: Any) -> None:
        """Say what came of each table."""
        verb = "would be copied" if options["dry_run"] else "copied"
        for table, rows, present in Import(options["database"], is_rehearsal=options["dry_run"]).run():
            if rows is None:
                self.stdout.write(f"{table}: no such table")
            else:
                self.stdout.write(f"{table}: {rows} {verb}, {present} already here")
