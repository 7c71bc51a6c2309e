from datetime import timedelta

BROKER_URL = "amqp://guest:guest@127.0.0.1:5672//"
CELERY_BACKEND_URL = "redis://127.0.0.1:6379/1"

CELERY_TIMEZONE = "Asia/Shanghai"

CELERYBEAT_SCHEDULE = {
    "add-every-2-seconds": {  # the tutorial has 30
        "task": "proj.tasks.add",
        "schedule": timedelta(seconds=2),
        "args": (16, 16),
    },
}
