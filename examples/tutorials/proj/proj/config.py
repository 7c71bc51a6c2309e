BROKER_URL = "amqp://guest:guest@127.0.0.1:5672//"
CELERY_BACKEND_URL = "redis://127.0.0.1:6379/1"

CELERY_TIMEZONE = "Asia/Shanghai"
