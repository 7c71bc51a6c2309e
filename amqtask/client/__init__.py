"""What callers do with an application: compose calls, send them, run them here."""
