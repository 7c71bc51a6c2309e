from mycelery.mail.tasks import send_email
from mycelery.sms.tasks import send_sms

ret = send_sms.delay()
print(ret, type(ret))
print(ret.ready())
print(ret.id)
print(ret.get(timeout=60))
print(ret.ready())
print(send_email.delay("someone@example.org").get(timeout=60))
