"""Limited, paced and unique tasks that write down when each run begins and ends, and book in a database (integration.flow_soak).

A record is a process, a number and a time, in a file of begins and one of ends for each of `KINDS`.
"""

from __future__ import annotations

import os
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from sqlalchemy import Column, Integer, MetaData, String, Table, create_engine, event
from sqlalchemy.orm import sessionmaker

from amqtask import AmqTask, Concurrency, Rate, Unique
from amqtask.contrib.sqlalchemy import SqlAlchemyInbox, inbox_table

FOLDER = Path(os.environ["FLOW_SOAK_FOLDER"])
QUEUE = os.environ["FLOW_SOAK_QUEUE"]
# Tasks that wait for something, and such that are over at once.
SLOW, QUICK = f"{QUEUE}-slow", f"{QUEUE}-quick"
# Runs at once: of a task, of each tenant, of the task that is over at once. Runs in a second, and at once after a pause.
PLACES, TENANTS_PLACES, BRIEF_PLACES, PER_SECOND, BURST = 16, 5, 2, 160, 160
TENANTS = ("acme", "globex", "initech")
# Seconds: of a run on average, and after which a dead worker's places are free.
SECONDS, LEASE = 0.2, 5.0
RECORD = struct.Struct("<IIdI")

app = AmqTask("flow-soak", broker=os.environ["FLOW_SOAK_BROKER"], flow_store=os.environ["FLOW_SOAK_STORE"])
app.conf.flow_lease = LEASE
app.conf.task_default_queue = QUICK
# Kills are no fault of the message.
app.conf.task_delivery_limit = 1000
metadata = MetaData()
bookings = Table("bookings", metadata, Column("number", Integer), Column("task_id", String(40)))
engine = create_engine(f"sqlite:///{FOLDER}/bank.db", connect_args={"timeout": 60})
inbox = SqlAlchemyInbox(app, inbox_table(metadata), sessions=sessionmaker(engine))
# Children of a pool are killed with it.
_main = os.getpid()


@event.listens_for(engine, "connect")
def _connected(connection: Any, _: object) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


@lru_cache
def _file(name: str) -> int:
    return os.open(FOLDER / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def _note(name: str, number: int, more: int = 0) -> None:
    os.write(_file(name), RECORD.pack(_main, number, time.monotonic(), more))


@contextmanager
def _run(kind: str, number: int, task_id: str = "") -> Iterator[None]:
    _note(f"{kind}.begins", number, zlib.crc32(task_id.encode()))
    yield
    _note(f"{kind}.ends", number)


def _work(number: int) -> None:
    time.sleep(SECONDS * (0.5 + number % 11 / 10))


@app.task(name="soak.limited", limits=Concurrency(PLACES), queue=SLOW)
def limited(number: int) -> None:
    """One of so many at once."""
    with _run("limited", number):
        _work(number)


@app.task(name="soak.of_tenant", limits=Concurrency(TENANTS_PLACES, by="tenant"), queue=SLOW)
def of_tenant(number: int, tenant: str) -> None:
    """One of so many of a tenant at once."""
    with _run(tenant, number):
        _work(number)


@app.task(name="soak.paced", limits=Rate(f"{PER_SECOND}/s", burst=BURST), queue=SLOW)
def paced(number: int) -> None:
    """One of so many in a second."""
    with _run("paced", number):
        pass


@app.task(name="soak.brief", limits=Concurrency(BRIEF_PLACES), queue=QUICK)
def brief(number: int) -> None:
    """One of two at once, and over at once."""
    with _run("brief", number):
        pass


@app.task(name="soak.booked", unique=Unique(by="number", until="ttl", ttl=600), inbox=True, queue=QUICK, bind=True)
def booked(self: Any, number: int) -> None:
    """Called once or twice, and booked once."""
    with _run("booked", number, self.request.id):
        inbox.session.execute(bookings.insert(), {"number": number, "task_id": self.request.id})
