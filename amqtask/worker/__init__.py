"""The worker: from a delivery to its answer. It knows a pool by its contract only (amqtask.pool), and none of the services.

`worker` is the page to begin with. What it is made of: `options`; `lifecycle` (start, long tasks, end) and `shutdown`
(signals, warm, cold); `strategy` (a message becomes a request) and `intake` (what is uncommon); `prefetch`, `dispatcher`
(who is next, and what is given back to others), `lines` (shards, batches, what a limit has no room for, rate
limits); `finisher` (results, dead letters, tasks whose process died) with `follow_ups` (until the broker has it); `deliveries`
(every answer; lost channels); `workflows` (chains and chords here); `revoked`; `report` (log lines, signals, observers);
`operations` (what services and remote control may ask and change).
"""

from __future__ import annotations

from amqtask.ground.plugins import others_names

__getattr__ = others_names(__name__)
