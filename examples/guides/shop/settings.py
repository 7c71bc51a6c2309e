"""Django's settings, and the application's with their prefix."""

import os

SECRET_KEY = "no secret"
INSTALLED_APPS = ["goods"]
DATABASES = {
    "default": {"ENGINE": "django.db.backends.sqlite3", "NAME": os.path.join(os.environ["GUIDE_FOLDER"], "db.sqlite3")}
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True
TIME_ZONE = "Europe/Berlin"

CELERY_TASK_DEFAULT_QUEUE = "shop-" + os.environ["GUIDE"]
CELERY_TASK_TRACK_STARTED = True
CELERY_TASK_TIME_LIMIT = 30 * 60
CELERY_TIMEZONE = TIME_ZONE
