import os
from datetime import timedelta

CELERY_BROKER_URL = "amqp://guest:guest@127.0.0.1:5672//"
CELERY_RESULT_BACKEND = "redis://127.0.0.1:6379/0"
CELERY_TIMEZONE = "Asia/Shanghai"
CELERYBEAT_SCHEDULE = {
    "sync-the-chain": {
        "task": "wallet.tasks.sync_chain",
        "schedule": timedelta(seconds=1),
        # A run that waited longer than until the next one is not needed any more.
        "options": {"expires": 1},
    },
}

CHAIN_URL = os.environ.get("CHAIN_URL", "http://127.0.0.1:8545")
DATABASE = os.environ.get("WALLET_DATABASE", "wallet.sqlite3")
