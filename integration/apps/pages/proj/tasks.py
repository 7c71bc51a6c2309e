"""Tasks."""

from __future__ import annotations

from smtplib import SMTPServerDisconnected

from . import app


@app.task(name="proj.tasks.mail")
def mail(address: str) -> str:
    """Ends well."""
    return address


@app.task(name="shop.send")
def send(address: str) -> None:
    """Does not."""
    raise SMTPServerDisconnected(f"no way to {address}")


@app.task(name="crawler.fetch")
def fetch() -> None:
    """Goes to a queue of its own."""


@app.task(name="reports.monthly")
def monthly() -> None:
    """Goes to another one."""
