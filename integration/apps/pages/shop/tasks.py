"""The application of a page that has its outbox in a module of its own."""

from __future__ import annotations

from . import app

app.conf.outbox = "shop.db:outbox"
