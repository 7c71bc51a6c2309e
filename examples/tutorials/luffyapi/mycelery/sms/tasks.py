from mycelery.main import app


@app.task(name="send_sms")
def send_sms():
    print("send an SMS!")
    return "sent"


@app.task
def send_sms2():
    print("SMS task 2!")
