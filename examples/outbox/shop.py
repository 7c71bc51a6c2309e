"""The shop: its tables, its application with an outbox, and the task that ships an order."""

from __future__ import annotations

import os

from sqlalchemy import create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from amqtask import AmqTask
from amqtask.contrib.sqlalchemy import SqlAlchemyOutbox, outbox_table

app = AmqTask("shop", task_default_queue="outbox-example")
# What the console of compose.yaml shows.
if index := os.environ.get("SHOP_HISTORY"):
    app.conf.update(task_history=True, history_url=index)


class Base(DeclarativeBase):
    """All tables."""


class Order(Base):
    """What somebody wants, and whether it has left."""

    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    what: Mapped[str]
    pieces: Mapped[int]
    is_shipped: Mapped[bool] = mapped_column(default=False)


engine = create_engine(os.environ.get("SHOP_DATABASE", "sqlite:///shop.db"))
Session = sessionmaker(engine)
outbox = SqlAlchemyOutbox(app, outbox_table(Base.metadata), sessions=Session)


@app.task
def ship(order_id: int) -> None:
    """Runs in a worker. An order that is shipped already is left alone: a call may come twice."""
    with Session.begin() as session:
        order = session.get_one(Order, order_id)
        order.is_shipped = True


class SoldOut(Exception):
    """There are not so many."""


def place_order(what: str, pieces: int) -> int:
    """An order and the call that ships it: both, or none of them."""
    with Session.begin() as session:
        order = Order(what=what, pieces=pieces)
        session.add(order)
        session.flush()  # gives the order its number
        ship.delay(order.id)
        if pieces > 10:
            raise SoldOut(what)
        return order.id
