"""Tests against real services, and the means to start and hurt them."""
