from flask import Flask

from wallet import config, database
from wallet.tasks import sync_chain, tasks


def create_app():
    app = Flask(__name__)
    app.config.from_object(config)
    app.teardown_appcontext(database.close)
    tasks.init_app(app)

    @app.get("/balances/<address>")
    def balance(address):
        return {"address": address, "amount": database.balance(address), "height": database.height()}

    @app.post("/sync")
    def sync():
        """For a user who does not want to wait for the schedule."""
        return {"task": sync_chain.delay().id}, 202

    return app
