import os

# The broker (the variable must have this name).
broker_url = "amqp://guest:guest@127.0.0.1:5672//"
# The result store (the variable must have this name).
result_backend = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/15")
