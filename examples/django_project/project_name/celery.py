import os

from amqtask import AmqTask
from amqtask.schedules import crontab

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project_name.settings")

app = AmqTask("project_name")

# - namespace="CELERY" means all amqtask-related configuration keys
#   should have a `CELERY_` prefix.
app.config_from_object("django.conf:settings", namespace="CELERY")

# Load task modules from all registered Django app configs.
app.autodiscover_tasks()


@app.task(bind=True)
def debug_task(self):
    print(f"Request: {self.request!r}")


@app.task
def test(arg):
    print(arg)


@app.on_after_configure.connect
def setup_periodic_tasks(sender, **kwargs):
    # Calls test("hello") every 10 seconds.
    sender.add_periodic_task(10.0, test.s("hello"), name="hello every 10")

    # Calls test("world") every 30 seconds
    sender.add_periodic_task(30.0, test.s("world"), expires=10)

    # Executes every Monday morning at 7:30 a.m.
    sender.add_periodic_task(crontab(hour=7, minute=30, day_of_week=1), test.s("Happy Mondays!"))


app.conf.beat_schedule = {
    "add-every-10-seconds": {
        "task": "notices.tasks.add",
        "schedule": 10.0,
        "args": (16, 4),
    },
}
