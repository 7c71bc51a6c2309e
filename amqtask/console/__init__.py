"""The console: what happens to tasks, queues and workers in a browser, and as JSON. `web.console` makes the ASGI application."""
