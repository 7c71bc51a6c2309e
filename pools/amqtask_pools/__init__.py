"""The execution pools that come with amqtask; a worker imports only the one that it uses. They know nothing of brokers.

`prefork` (its `__init__` is the pool in the parent), `threads`, `asyncio`, `solo`; `eventlet` and `gevent` are `_green`, over the
library's `_hub`. `_slot_table` is common to pools in the worker's process, `_limits` are time limits by signals.
"""
