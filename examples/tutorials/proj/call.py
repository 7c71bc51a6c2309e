from proj.tasks import add

print(add.delay(2, 3).get(timeout=60))
