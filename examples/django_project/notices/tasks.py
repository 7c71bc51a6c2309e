from amqtask import shared_task

from .dingtalk import send


@shared_task
def send_dingtalk_message(message):
    send(message)


@shared_task
def add(x, y):
    return x + y


@shared_task
def welcome(name):
    return f"welcome, {name}"
