"""The table of the transactional outbox."""

import django.utils.timezone
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("amqtask", "0001_initial")]

    operations = [
        migrations.CreateModel(
            name="OutboxMessage",
            fields=[
                ("id", models.BigAutoField(primary_key=True, serialize=False)),
                ("task_id", models.CharField(max_length=255, verbose_name="task id")),
                ("task", models.CharField(max_length=255, verbose_name="task")),
                ("message", models.TextField(editable=False, verbose_name="message")),
                ("body", models.BinaryField(verbose_name="body")),
                ("created_at", models.DateTimeField(default=django.utils.timezone.now, verbose_name="created")),
                ("attempts", models.IntegerField(default=0, verbose_name="attempts")),
                ("error", models.TextField(null=True, verbose_name="error")),
                ("retry_at", models.DateTimeField(null=True, verbose_name="next attempt")),
            ],
            options={
                "verbose_name": "outgoing call",
                "verbose_name_plural": "outbox",
                "db_table": "amqtask_outbox",
                "ordering": ("id",),
            },
        ),
    ]
