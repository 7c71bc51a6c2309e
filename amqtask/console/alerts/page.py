"""What the page of alerts shows, as plain data, and what can be done there."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from amqtask.console.alerts.destinations import destinations
from amqtask.console.alerts.log import AlertLog
from amqtask.console.alerts.rules import rules
from amqtask.console.alerts.watch import Watch
from amqtask.exceptions import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from amqtask.app import AmqTask
    from amqtask.ground.shapes import JsonObject

MOST_PAST, MOST_UNTOLD = 100, 20


def alerts(app: AmqTask) -> JsonObject:
    """The rules, what fires, what fired, who is told, and what could not be told."""
    log = AlertLog(app.history.index)
    return {
        "rules": [asdict(rule) for rule in rules(app.conf.console_alerts).values()],
        "destinations": list(destinations(app)),
        "firing": sorted(log.firing().values(), key=lambda alert: -alert["began_at"]),
        "past": log.past(MOST_PAST),
        "untold": log.untold(MOST_UNTOLD),
    }


def send_test(app: AmqTask, form: Mapping[str, str], user: str) -> str:
    """Send a test to all destinations. Raises: ConfigurationError saying which does not take it, and why."""
    answers = Watch(app).test()
    if not answers:
        raise ConfigurationError("console_alert_to is empty: nobody is told")
    if wrong := {mark: problem for mark, problem in answers.items() if problem is not None}:
        raise ConfigurationError("; ".join(f"{mark}: {problem}" for mark, problem in wrong.items()))
    return f"a test was sent to {', '.join(answers)}"
