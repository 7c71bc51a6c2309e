"""Remote control, the client's end: `control` (Control and Inspect) tells and asks workers, `commands` is the table of all
commands.

The worker's end is `amqtask.services`.
"""
