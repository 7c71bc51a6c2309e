"""Import paths that Celery's users have in their code, and nothing else: what is here lives elsewhere."""
