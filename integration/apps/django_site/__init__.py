"""A Django project for the tests of amqtask.contrib.django."""
