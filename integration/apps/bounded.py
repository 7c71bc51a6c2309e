"""The sample with a small bound for bodies."""

from __future__ import annotations

from integration.apps.sample import app

app.conf.worker_max_body_size = 1_000_000
