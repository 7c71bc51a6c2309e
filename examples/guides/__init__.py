"""Programs in the style of the chapters of Celery's guide. With `celery` in place of `amqtask` in their imports they run under
Celery and give the same results (integration/test_guides.py)."""
