"""Periodic tasks by two beats, one of which dies."""
