"""Wall clocks: crontab fields, time zones, the sun. Pure: no I/O."""
