"""Django: results and periodic tasks as models, their admin, and a worker that treats Django as a request does.

`INSTALLED_APPS += ["amqtask.contrib.django"]`. Nothing here is imported by a program that does not use Django.
"""
