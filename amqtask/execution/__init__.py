"""Runs one message and returns one outcome: the same code in every pool, inline and in tests."""
