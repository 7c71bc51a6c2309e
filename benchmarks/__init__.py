"""Measures ours beside bare pika and our peers, in one run; never a test."""
