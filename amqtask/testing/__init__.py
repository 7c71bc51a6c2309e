"""For users and plug-in authors: suites and helpers for tests."""
