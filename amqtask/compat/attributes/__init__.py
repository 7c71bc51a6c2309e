"""Attributes of our objects under Celery's names, one module for each kind of object: what is in its class is bound to ours."""
