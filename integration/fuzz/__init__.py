"""Hostile messages to a live worker: see `python -m integration.fuzz --help`."""
