"""Run it: `python -m examples.outbox` with a broker in AMQTASK_BROKER_URL (or on this machine); the database is a file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

AMQTASK = [sys.executable, "-m", "amqtask", "-q", "-A", "examples.outbox.shop"]


def order(shop: Any) -> None:
    """No broker is needed to take orders."""
    shop.Base.metadata.create_all(shop.engine)
    shop.place_order("apples", 3)
    try:
        shop.place_order("pears", 11)
    except shop.SoldOut as error:
        print("sold out:", error, flush=True)
    shop.place_order("plums", 7)
    store = shop.outbox.store()
    print("calls in the outbox:", store.waiting().rows, flush=True)
    store.close()


def shipped(shop: Any) -> list[str]:
    """What has left."""
    with shop.Session() as session:
        orders = session.query(shop.Order).filter_by(is_shipped=True).order_by(shop.Order.id)
        return [f"{found.pieces} {found.what}" for found in orders]


def main() -> int:
    """The exit code is the worker's."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SHOP_DATABASE"] = f"sqlite:///{Path(folder, 'shop.db')}"
        from examples.outbox import shop  # noqa: PLC0415 - it opens the database that is named above

        order(shop)
        subprocess.run([*AMQTASK, "relay", "--once"], check=True)
        worker = subprocess.Popen([*AMQTASK, "worker", "-P", "solo", "-l", "CRITICAL"], start_new_session=True)
        try:
            deadline = time.monotonic() + 60
            while len(shipped(shop)) < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            print("shipped:", ", ".join(shipped(shop)))
            worker.send_signal(signal.SIGTERM)
            return worker.wait(timeout=60)
        finally:
            if worker.poll() is None:
                worker.kill()
            shop.engine.dispose()


if __name__ == "__main__":
    sys.exit(main())
