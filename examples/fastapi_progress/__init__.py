"""Live progress of a task in a browser: FastAPI, server-sent events, `update_state`."""
