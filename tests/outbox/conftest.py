"""A shop whose orders are rows beside the outbox, in an SQLite file, and an application on the in-memory broker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Column, Engine, Integer, MetaData, String, Table, create_engine, func, select
from sqlalchemy.orm import Session, registry, sessionmaker

from amqtask import AmqTask
from amqtask.assembly import build_relay
from amqtask.contrib.sqlalchemy import SqlAlchemyOutbox, outbox_table
from amqtask.outbox.relay import Relay, Step
from amqtask.transport.memory.broker import MemoryBroker


class Shop:
    """Everything that a test of the outbox touches."""

    def __init__(self, path: Path) -> None:
        metadata = MetaData()
        self.orders = Table("orders", metadata, Column("id", Integer, primary_key=True), Column("what", String(40)))
        self.table = outbox_table(metadata)
        self.Order: Any = type("Order", (), {})
        registry(metadata=metadata).map_imperatively(self.Order, self.orders)
        self.path = path
        self.engine: Engine = create_engine(f"sqlite:///{path}")
        metadata.create_all(self.engine)
        self.sessions = sessionmaker(self.engine)
        self.app = AmqTask("shop", broker="memory://", backend="cache+memory://", set_as_current=False)
        self.app.task(name="ship")(lambda *args: None)
        self.outbox = SqlAlchemyOutbox(self.app, self.table, sessions=self.sessions)
        self._relays: list[Relay] = []

    @property
    def broker(self) -> MemoryBroker:
        assert self.app.memory_broker is not None
        return self.app.memory_broker

    def order(self, session: Session) -> None:
        found = self.Order()
        found.what = "apple"
        session.add(found)

    def ship(self, *args: Any, **options: Any) -> Any:
        return self.app.tasks["ship"].apply_async(args, **options)

    def relay(self, **options: Any) -> Relay:
        relay = build_relay(self.app)
        made = Relay(relay.store, self.app.publisher, self.app.delays, **{"timeout": 5.0, **options})
        self._relays.append(made)
        return made

    def relayed(self) -> Step:
        return self.relay().drain()

    @property
    def rows(self) -> int:
        with self.engine.connect() as connection:
            return int(connection.execute(select(func.count()).select_from(self.table)).scalar_one())

    def sent(self, queue: str = "amqtask") -> list[str]:
        """The ids of messages in a queue."""
        if queue not in self.broker.queue_names():
            return []
        return [properties.headers["id"] for properties, _ in self.broker.messages(queue)]

    def close(self) -> None:
        for relay in self._relays:
            relay.store.close()
        self.app.close()
        self.engine.dispose()


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    made = Shop(tmp_path / "shop.db")
    yield made
    made.close()
