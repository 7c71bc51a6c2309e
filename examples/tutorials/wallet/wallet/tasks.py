import json
from urllib.request import urlopen

from flask import current_app

from amqtask.contrib.flask import AmqTask
from wallet import database

tasks = AmqTask()


@tasks.task(autoretry_for=(OSError,), max_retries=3, retry_backoff=True)
def sync_chain():
    """Take over the blocks that are new on the chain; how many there were."""
    url = f"{current_app.config['CHAIN_URL']}/blocks?after={database.height()}"
    with urlopen(url, timeout=10) as answer:
        blocks = json.load(answer)
    return sum(database.add(block) for block in blocks)
