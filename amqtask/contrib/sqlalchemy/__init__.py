"""For SQLAlchemy's sessions (extra `sqlalchemy`): the transactional outbox and the inbox."""

from __future__ import annotations

from amqtask.contrib.sqlalchemy.inbox import SqlAlchemyInbox, inbox_table
from amqtask.contrib.sqlalchemy.outbox import SqlAlchemyOutbox, SqlAlchemyStore, outbox_table

__all__ = ["SqlAlchemyInbox", "SqlAlchemyOutbox", "SqlAlchemyStore", "inbox_table", "outbox_table"]
