"""Testing: tasks as functions, inline, eager, with their calls replaced, and with a worker in a thread."""

import json
from unittest.mock import patch

from amqtask import Celery
from amqtask.contrib.testing.worker import start_worker
from amqtask.exceptions import Retry

app = Celery("testing", broker="memory://", backend="cache+memory://")


@app.task
def add(x, y):
    return x + y


@app.task(bind=True, max_retries=3)
def send_order(self, product):
    try:
        return order(product)
    except OSError as error:
        raise self.retry(exc=error, countdown=0)


def order(product):
    return "ordered " + product


@app.task
def twice(x):
    return add.apply(args=(x, x)).get(disable_sync_subtasks=False)


@app.task
def kind_of(value):
    return type(value).__name__


def main():
    found = {}
    found["as a function"] = add(1, 1)
    found["inline"] = add.apply(args=(2, 2)).get()
    with patch("__main__.order") as mock:
        mock.side_effect = OSError("no stock")
        with patch.object(send_order, "retry", side_effect=Retry()) as retry:
            try:
                send_order("tea")
            except Retry:
                found["retried"] = [retry.called, str(retry.call_args.kwargs["exc"])]
        result = send_order.apply(("tea",))
        found["gave up"] = [result.state, str(result.result), mock.call_count]
    found["ordered"] = send_order.apply(("tea",)).get()
    with patch.object(add, "delay") as delay:
        add.delay(3, 3)
        found["asserted"] = [list(call.args) for call in delay.call_args_list]

    app.conf.task_always_eager = True
    found["eager"] = add.delay(4, 4).get()
    found["eager chain"] = (add.s(1, 1) | add.s(2)).delay().get()
    found["eager nested"] = twice.delay(5).get()
    found["eager json"] = kind_of.delay((1, 2)).get()
    try:
        add.delay({1}, {2})
    except Exception as error:
        found["eager error"] = type(error).__name__
    app.conf.task_always_eager = False
    with start_worker(app, perform_ping_check=False):
        found["worker"] = add.delay(8, 8).get(timeout=30)
        found["worker chain"] = (add.s(1, 1) | add.s(2)).delay().get(timeout=30)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
