from wedo import app


@app.task
def add(x, y):
    return x + y


@app.task
def to_string(text):
    return f"this is {text}"
