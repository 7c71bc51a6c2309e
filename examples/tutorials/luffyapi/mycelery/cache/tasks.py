from mycelery.main import app


@app.task
def warm(pages):
    return len(pages)
