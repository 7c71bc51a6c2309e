from mycelery.sms.tasks import send_sms

from amqtask.result import AsyncResult

ret = send_sms.delay()
async_task = AsyncResult(id=ret.id, app=send_sms)

result = async_task.get(timeout=60)
print(async_task.successful())
print(result)
