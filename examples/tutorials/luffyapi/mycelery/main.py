from amqtask import AmqTask

app = AmqTask("luffy")

app.config_from_object("mycelery.config")

# Finds sms/tasks.py and mail/tasks.py; folders need no __init__.py.
app.autodiscover_tasks(["mycelery.sms", "mycelery.mail", "mycelery.cache"])

# amqtask -A mycelery.main worker --loglevel=info
