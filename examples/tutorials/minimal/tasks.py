from amqtask import AmqTask

app = AmqTask("tasks", broker="amqp://guest:guest@127.0.0.1:5672//", backend="redis://127.0.0.1")


@app.task
def add(x, y):
    return x + y
