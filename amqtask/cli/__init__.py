"""The command line; click is imported here only."""
