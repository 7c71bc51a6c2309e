"""The table of calls that have run: those of tasks with inbox=True."""

import django.utils.timezone
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("amqtask", "0002_outbox")]

    operations = [
        migrations.CreateModel(
            name="InboxCall",
            fields=[
                (
                    "task_id",
                    models.CharField(max_length=255, primary_key=True, serialize=False, verbose_name="task id"),
                ),
                ("task", models.CharField(max_length=255, verbose_name="task")),
                (
                    "created_at",
                    models.DateTimeField(db_index=True, default=django.utils.timezone.now, verbose_name="created"),
                ),
                ("content_type", models.CharField(max_length=128, null=True, verbose_name="content type")),
                ("content_encoding", models.CharField(max_length=64, null=True, verbose_name="encoding")),
                ("body", models.BinaryField(default=b"", verbose_name="result")),
            ],
            options={
                "verbose_name": "call that has run",
                "verbose_name_plural": "inbox",
                "db_table": "amqtask_inbox",
            },
        ),
    ]
