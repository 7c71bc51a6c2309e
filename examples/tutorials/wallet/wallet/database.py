"""One connection to SQLite for each application context: of a request, or of a task."""

import sqlite3

from flask import current_app, g

SCHEMA = """
CREATE TABLE IF NOT EXISTS blocks (height INTEGER PRIMARY KEY);
CREATE TABLE IF NOT EXISTS balances (address TEXT PRIMARY KEY, amount INTEGER NOT NULL);
"""


def database():
    if "database" not in g:
        g.database = sqlite3.connect(current_app.config["DATABASE"], timeout=10)
        g.database.executescript(SCHEMA)
    return g.database


def close(error):
    found = g.pop("database", None)
    if found is not None:
        found.close()


def height():
    return database().execute("SELECT coalesce(max(height), 0) FROM blocks").fetchone()[0]


def balance(address):
    row = database().execute("SELECT amount FROM balances WHERE address = ?", (address,)).fetchone()
    return row[0] if row else 0


def add(block):
    """A block counts once, however often it is added: its height is the key, and all of it is one transaction."""
    with database() as transaction:
        added = transaction.execute("INSERT OR IGNORE INTO blocks VALUES (?)", (block["height"],)).rowcount
        if added:
            transaction.executemany(
                "INSERT INTO balances VALUES (:to, :amount) "
                "ON CONFLICT (address) DO UPDATE SET amount = amount + excluded.amount",
                block["transfers"],
            )
    return added
