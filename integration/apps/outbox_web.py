"""A web process as integration.outbox kills it: one order after the other, half of them rolled back.

    python -m integration.apps.outbox_web SHOP JOURNAL COUNT PAUSE

SHOP is a module such as integration.apps.outbox_django. The journal gets a line when a transaction begins and one when the
client knows how it ended; after a kill the next process goes on until COUNT commits and COUNT rollbacks are known.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import uuid
from collections import Counter
from pathlib import Path

from integration.apps.outbox_journal import Failed, Journal


def main(shop_name: str, path: str, count: int, pause: float) -> None:
    """Until as many commits and rollbacks are known."""
    shop = importlib.import_module(shop_name)
    journal = Journal(Path(path))
    missing = Counter(
        commit=count - len(journal.ids("ended", "commit")),
        rollback=count - len(journal.ids("ended", "rollback", "fail")),
    )
    while +missing:
        for end in [kind for kind in missing if missing[kind] > 0]:
            how = "fail" if end == "rollback" and missing[end] % 2 else end
            task_id = str(uuid.uuid4())
            journal.write("begun", how, task_id)
            with contextlib.suppress(Failed):
                shop.order(task_id, how, pause)
            journal.write("ended", how, task_id)
            missing[end] -= 1


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
