"""A shop with an outbox, on SQLAlchemy: an order and the call that ships it are one transaction."""

from __future__ import annotations

import os
import time

from sqlalchemy import Column, MetaData, String, Table, create_engine, insert, select
from sqlalchemy.orm import Session

from amqtask import AmqTask
from amqtask.contrib.sqlalchemy import SqlAlchemyOutbox, outbox_table
from integration.apps.outbox_journal import Failed

app = AmqTask("shop", task_default_queue=os.environ.get("SHOP_QUEUE", "shop"))
metadata = MetaData()
orders = Table("orders", metadata, Column("task_id", String(40), primary_key=True))
rows = outbox_table(metadata)
engine = create_engine(os.environ["SHOP_DATABASE"].replace("postgresql:", "postgresql+psycopg:", 1))
outbox = SqlAlchemyOutbox(app, rows, engine=engine)


@app.task(name="shop.ship")
def ship(order: str) -> str:
    """What an order leads to."""
    return order


def prepare() -> None:
    """Make the tables."""
    metadata.create_all(engine)


def order(task_id: str, end: str, pause: float) -> None:
    """One transaction, which ends as told: commit, rollback or fail."""
    with Session(engine) as session, outbox.using(session):
        session.execute(insert(orders).values(task_id=task_id))
        time.sleep(pause / 2)
        ship.apply_async((task_id,), task_id=task_id)
        time.sleep(pause / 2)
        if end == "fail":
            raise Failed
        if end == "commit":
            session.commit()
        else:
            session.rollback()


def ordered() -> set[str]:
    """The orders that were committed."""
    with engine.connect() as connection:
        return set(connection.execute(select(orders.c.task_id)).scalars())
