"""Services on a worker's loop: each has `start` and `stop`, and the worker runs without them, too. `amqtask.assembly` chooses.

Delays: `forwarder`. Remote control: `panel` (mailbox), `commands` (what each does), `revoking` (also between workers),
`kept_orders` (what the broker keeps of it), `elections`, `command_context` (what commands see). Events: `events`. Monitors:
`monitoring` (health), `metrics`, `watchdog`. The pool: `autoscale`, `reloading`.
"""
