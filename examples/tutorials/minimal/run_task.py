from tasks import add

result = add.delay(4, 4)
print("Is Task ready: %s" % result.ready())

run_result = result.get(timeout=60)
print("task result: %s" % run_result)
