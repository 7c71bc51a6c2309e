from amqtask.schedules import crontab
from wedo import app
from wedo.tasks import add, to_string


@app.on_after_configure.connect
def setup_periodic_tasks(sender, **kwargs):
    sender.add_periodic_task(1.0, to_string.s("celery peroid task"), name="to_string")
    sender.add_periodic_task(
        crontab(hour=7, minute=30, day_of_week=1),
        add.s(5, 6),
        name="add on Mondays",
    )
