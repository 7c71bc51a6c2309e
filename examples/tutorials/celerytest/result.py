import sys

from celery_app_task import cel

from amqtask.result import AsyncResult

# `async`, as the tutorial names it, is a word of Python's since 3.7.
found = AsyncResult(id=sys.argv[1], app=cel)

if found.successful():
    result = found.get()
    print(result)
    if "forget" in sys.argv:
        found.forget()
elif found.failed():
    print("failed")
elif found.status == "PENDING":
    print("waiting to be run")
elif found.status == "RETRY":
    print("to be tried again after an error")
elif found.status == "STARTED":
    print("running")
