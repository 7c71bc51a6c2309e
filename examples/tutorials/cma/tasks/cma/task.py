from amqtask import AmqTask, Task

app = AmqTask("cma", broker="amqp://guest:guest@127.0.0.1:5672//", backend="redis://127.0.0.1:6379/0")
app.conf.task_default_queue = "cma_queue"


class RollbackTask(Task):
    """Undoes what a failed task has done."""

    def on_failure(self, exc, task_id, args, kwargs, einfo):
        print(f"rolled back {self.name}{tuple(args)}: {exc}")


@app.task(bind=True, base=RollbackTask, rate_limit="500/m", ignore_result=True, max_retries=0)
def my_task(self, x, y):
    try:
        print(f"{x} / {y} = {x // y}, at most {self.rate_limit}")
    except ZeroDivisionError as error:
        raise self.retry(exc=error) from error
