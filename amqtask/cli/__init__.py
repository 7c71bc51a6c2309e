"""The command line; click is imported here only. `main` lists the commands, and where each is.

What several commands share: `globals` (options before the command), `params`, `output`, `broker` (queues and routes to ask
about), `find_app`, `logs`, `daemon`, `move_messages`.
"""
