"""What the values of settings, and the options of tasks and calls, may be; no I/O."""
