from mycelery.main import app


@app.task
def send_email(address="user@example.org"):
    return f"mailed {address}"
