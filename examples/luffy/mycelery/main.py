# The main program.
import os

from amqtask import AmqTask

# There may be many applications, so each has a name.
app = AmqTask("luffy")

# Tie it to Django: find and load Django's settings.
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "luffyapi.settings.dev")
import django  # noqa: E402

django.setup()

# Load the configuration.
app.config_from_object("mycelery.config")

# Load the tasks: the modules `tasks` of these packages.
app.autodiscover_tasks(["mycelery.sms", "mycelery.mail"])

# amqtask -A mycelery.main worker --loglevel=info -P eventlet
