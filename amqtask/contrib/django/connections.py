"""This thread's database connections, between two pieces of work."""

from __future__ import annotations

from django import db


def close_old_connections() -> None:
    """Close connections that are broken or older than CONN_MAX_AGE, but none in a transaction (which Django would close)."""
    for connection in db.connections.all(initialized_only=True):
        if not connection.in_atomic_block:
            connection.close_if_unusable_or_obsolete()


def close_broken_connections() -> None:
    """Close connections that had an error and do not answer any more; however old, the others stay."""
    for connection in db.connections.all(initialized_only=True):
        if connection.errors_occurred and not connection.in_atomic_block and not connection.is_usable():
            connection.close()
