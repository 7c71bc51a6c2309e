from mycelery.sms.tasks import send_sms, send_sms2

print(send_sms.delay().get(timeout=60))
print(send_sms2.delay().get(timeout=60))
