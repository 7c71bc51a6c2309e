from mycelery.main import app


@app.task(name="send_email")
def send_email(address):
    print(f"a mail to {address}")
