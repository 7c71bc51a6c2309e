"""An application whose tasks book in a database, once each; a file has the worker killed when one has committed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from sqlalchemy import Column, Integer, MetaData, String, Table, create_engine, event
from sqlalchemy.orm import Session, sessionmaker

from amqtask import AmqTask
from amqtask.contrib.sqlalchemy import SqlAlchemyInbox, inbox_table

FOLDER = Path(os.environ["INBOX_FOLDER"])
app = AmqTask(
    "inbox",
    broker=os.environ["INBOX_BROKER"],
    backend=f"db+sqlite:///{FOLDER}/results.db",
    task_default_queue=os.environ["INBOX_QUEUE"],
)
if os.environ["INBOX_BROKER"].startswith("redis"):
    app.conf.broker_transport_options = {"lease": 4}
metadata = MetaData()
bookings = Table("bookings", metadata, Column("id", Integer, primary_key=True), Column("what", String(40)))
engine = create_engine(f"sqlite:///{FOLDER}/bank.db")
sessions = sessionmaker(engine)
inbox = SqlAlchemyInbox(app, inbox_table(metadata), sessions=sessions)


@app.task(name="inbox.pay", inbox=True)
def pay(amount: int) -> int:
    """Book it."""
    inbox.session.execute(bookings.insert(), {"what": f"paid {amount}"})
    return amount


@app.task(name="inbox.thank", inbox=True)
def thank(amount: int) -> str:
    """Book that, too."""
    inbox.session.execute(bookings.insert(), {"what": f"thanked for {amount}"})
    return f"thanked for {amount}"


def kill_the_worker(session: Session) -> None:
    """The task has committed; its result is not stored, what follows not published, and its message not acknowledged."""
    for wish in FOLDER.glob("kill *"):
        wish.unlink()
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


event.listen(sessions, "after_commit", kill_the_worker)
