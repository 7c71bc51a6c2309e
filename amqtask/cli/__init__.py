"""The command line; click is imported here only. `main` lists the commands, and where each is.

What several commands share: `base` (the options before the command, and how it prints), `params` (its own options), `broker`
(queues and routes to ask about), `find_app`, `logs`, `daemon`.
"""
