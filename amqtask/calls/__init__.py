"""A call as data, and what it knows of its application."""
