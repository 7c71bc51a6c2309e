"""The messages on the wire: pure functions and frozen data, no I/O."""
