broker_url = "amqp://guest:guest@127.0.0.1:5672//"
result_backend = "redis://127.0.0.1:6379/15"
