from tasks.cma.task import my_task

print(my_task.delay(6, 3).id)
print(my_task.delay(6, 0).id)
