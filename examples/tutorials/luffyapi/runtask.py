from mycelery.sms.tasks import send_sms, send_sms2

print(send_sms.delay().get(timeout=10))
print(send_sms2.delay().get(timeout=10))
