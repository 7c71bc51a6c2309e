"""What fired, and who has still to be told, in the history's index: so it lasts, and several consoles tell once.

An alert and its notices are one transaction; an open alert of one rule and subject is there once (a unique index says so). A
notice is claimed by who sends it for a while: one that is killed meanwhile leaves it to the next, so that it may come twice, but
not never."""

from __future__ import annotations

import hashlib
import http.client
import json
import smtplib
import ssl
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.message import EmailMessage
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote, urlsplit

import sqlalchemy as sa

from amqtask.exceptions import ConfigurationError, OperationalError
from amqtask.ground.printable import printable
from amqtask.history.index import IndexUnreachable
from amqtask.history.tables import ALERTS, DEPTHS, NOTICES

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.ground.shapes import JsonObject
    from amqtask.history.index import HistoryIndex

# Seconds that a claim lasts; a destination has less to answer.
CLAIM_SECONDS = 60.0
# Seconds before the next attempts; a notice is given up after the last of as many as make a day.
FIRST_PAUSE, LONGEST_PAUSE, GIVE_UP_AFTER = 5.0, 600.0, 86_400.0


class Problem(NamedTuple):
    """What a rule has found."""

    rule: str
    subject: str
    text: str
    value: float
    limit: float

    @property
    def key(self) -> tuple[str, str]:
        """One problem is one alert, however its numbers change."""
        return self.rule, self.subject


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that a destination is to be told. `destination` is its mark, not its address."""

    id: int
    destination: str
    body: Mapping[str, object]
    attempts: int
    made_at: float


class AlertLog:
    """See the module; times are Unix times. Each method raises IndexUnreachable."""

    def __init__(self, index: HistoryIndex) -> None:
        self._index = index

    def firing(self) -> dict[tuple[str, str], JsonObject]:
        """The open alerts, by rule and subject."""
        return {(row["rule"], row["subject"]): row for row in self._rows(ALERTS.c.ended_at.is_(None), 10_000)}

    def past(self, limit: int) -> list[JsonObject]:
        """Those that are over, the newest first."""
        return self._rows(ALERTS.c.ended_at.is_not(None), limit)

    def _rows(self, condition: sa.ColumnElement[bool], limit: int) -> list[JsonObject]:
        statement = sa.select(ALERTS).where(condition).order_by(ALERTS.c.id.desc()).limit(limit)
        return self._index.transact(lambda connection: [dict(row) for row in connection.execute(statement).mappings()])

    def fire(self, problem: Problem, now: float, destinations: Sequence[str], body: Mapping[str, object]) -> bool:
        """Open an alert, and have these destinations told. False: it is open already, by whoever opened it."""
        values = {
            "rule": problem.rule, "subject": problem.subject, "text": problem.text, "began_at": now,
        }  # fmt: skip
        is_open = (ALERTS.c.rule == problem.rule, ALERTS.c.subject == problem.subject, ALERTS.c.ended_at.is_(None))

        def change(connection: sa.Connection) -> bool:
            if connection.execute(sa.select(ALERTS.c.id).where(*is_open)).first() is not None:
                return False
            connection.execute(sa.insert(ALERTS).values(values))
            number = int(connection.execute(sa.select(ALERTS.c.id).where(*is_open)).scalar_one())
            _add_notices(connection, number, now, destinations, {**body, "id": number})
            return True

        try:
            return self._index.transact(change)
        except IndexUnreachable as error:
            if isinstance(error.__cause__, sa.exc.IntegrityError):
                return False  # another console was faster by a moment
            raise

    def resolve(self, number: int, now: float, destinations: Sequence[str], body: Mapping[str, object]) -> bool:
        """Close an alert, and have these destinations told. False: it is closed already."""
        statement = sa.update(ALERTS).where(ALERTS.c.id == number, ALERTS.c.ended_at.is_(None)).values(ended_at=now)

        def change(connection: sa.Connection) -> bool:
            is_ours = connection.execute(statement).rowcount == 1
            if is_ours:
                _add_notices(connection, number, now, destinations, {**body, "id": number})
            return is_ours

        return self._index.transact(change)

    # -- notices

    def claim(self, now: float) -> Notice | None:
        """A notice that is due, to send now; nobody else sends it meanwhile. One waits for those before it."""
        c = NOTICES.c
        earlier = NOTICES.alias("earlier")
        is_first = ~sa.exists().where(
            earlier.c.alert == c.alert, earlier.c.destination == c.destination, earlier.c.id < c.id,
            earlier.c.done_at.is_(None),
        )  # fmt: skip
        due = sa.select(NOTICES).where(c.done_at.is_(None), c.due_at <= now, is_first).order_by(c.id).limit(1)

        def change(connection: sa.Connection) -> Notice | None:
            row = connection.execute(due).mappings().first()
            if row is None:
                return None
            is_ours = (c.id == row["id"], c.due_at == row["due_at"], c.done_at.is_(None))
            if connection.execute(sa.update(NOTICES).where(*is_ours).values(due_at=now + CLAIM_SECONDS)).rowcount != 1:
                return None
            return Notice(row["id"], row["destination"], json.loads(row["body"]), row["attempts"], row["made_at"])

        return self._index.transact(change)

    def told(self, notice: Notice, now: float) -> None:
        """It has been told."""
        self._change(notice, done_at=now, error=None)

    def failed(self, notice: Notice, now: float, error: str) -> None:
        """It could not be told: again later, for a day."""
        attempts = notice.attempts + 1
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(attempts - 1, 20))
        is_over = now - notice.made_at > GIVE_UP_AFTER
        self._change(notice, attempts=attempts, error=error[:500], due_at=now + pause, done_at=now if is_over else None)

    def _change(self, notice: Notice, **values: object) -> None:
        statement = sa.update(NOTICES).where(NOTICES.c.id == notice.id).values(values)
        self._index.transact(lambda connection: connection.execute(statement))

    def untold(self, limit: int) -> list[JsonObject]:
        """Notices that could not be told yet, or were given up, the newest first."""
        c = NOTICES.c
        columns = (c.alert, c.destination, c.made_at, c.attempts, c.error, c.done_at)
        statement = sa.select(*columns).where(c.error.is_not(None)).order_by(c.id.desc()).limit(limit)
        return self._index.transact(lambda connection: [dict(row) for row in connection.execute(statement).mappings()])

    def forget(self, before: float) -> None:
        """Delete alerts that were over before that time, and their notices."""
        old = sa.select(ALERTS.c.id).where(ALERTS.c.ended_at < before)

        def change(connection: sa.Connection) -> None:
            connection.execute(sa.delete(NOTICES).where(NOTICES.c.alert.in_(old)))
            connection.execute(sa.delete(ALERTS).where(ALERTS.c.ended_at < before))

        self._index.transact(change)


def _add_notices(
    connection: sa.Connection, alert: int, now: float, destinations: Sequence[str], body: Mapping[str, object]
) -> None:
    rows = [
        {"alert": alert, "destination": mark, "body": json.dumps(body), "made_at": now, "due_at": now, "attempts": 0}
        for mark in destinations
    ]
    if rows:
        connection.execute(sa.insert(NOTICES), rows)


# -- How deep queues were: noted about once a minute by who looks for alerts, so that the overview can say which ones grow.

# Minutes over which growth is told, after which a depth is not told any more, and that depths are kept.
GROWTH_MINUTES, STALE_MINUTES, KEPT_MINUTES = 10, 5, 1_440


def note_depths(index: HistoryIndex, ready: Mapping[str, int], now: float) -> None:
    """Note how many messages are ready in each queue at this time, in place of what the minute had."""
    minute = int(now // 60)
    rows = [{"minute": minute, "queue": queue, "ready": number} for queue, number in ready.items()]

    def change(connection: sa.Connection) -> None:
        is_old = DEPTHS.c.minute < minute - KEPT_MINUTES
        connection.execute(sa.delete(DEPTHS).where(sa.or_(is_old, DEPTHS.c.minute == minute)))
        if rows:
            connection.execute(sa.insert(DEPTHS), rows)

    index.transact(change)


def growing_queues(app: AmqTask) -> list[JsonObject]:
    """Queues with messages, those that grow most first: how many are ready, how many more than ten minutes before (None: nobody
    looked then), and since when the oldest waits (seconds)."""
    minute = int(time.time() // 60)
    since = minute - GROWTH_MINUTES - STALE_MINUTES
    statement = sa.select(DEPTHS).where(DEPTHS.c.minute >= since).order_by(DEPTHS.c.minute)
    depths_by_queue: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for row in app.history.index.transact(lambda connection: list(connection.execute(statement).mappings())):
        depths_by_queue[row["queue"]].append((row["minute"], row["ready"]))
    shown: list[JsonObject] = []
    for queue, depths in depths_by_queue.items():
        last, ready = depths[-1]
        if last < minute - STALE_MINUTES or not ready:
            continue
        before = next((number for at, number in reversed(depths) if at <= last - GROWTH_MINUTES), None)
        growth = None if before is None else ready - before
        shown.append({"queue": queue, "ready": ready, "growth": growth, "waits": app.history.waits(queue)})
    return sorted(shown, key=lambda row: (-(row["growth"] or 0), -row["ready"]))


# -- Where alerts go: a webhook (JSON), Slack's format, or e-mail. Blocking. What strangers have written in them stays text.

# Seconds that a destination has to answer.
ANSWER_SECONDS = 10.0
_SLACK_HOST = "hooks.slack.com"
_MAIL_FIELDS = frozenset({"host", "port", "user", "password", "from", "tls"})


class NotTold(OperationalError):
    """A destination does not take it now."""


class NoAnswer(NotTold):
    """It says nothing, so it would not take another one either."""


@dataclass(frozen=True, slots=True)
class Destination:
    """One of `console_alert_to`. `mark` stands for it in the index and in logs: its address may be a secret."""

    kind: str
    address: str
    mail: Mapping[str, object]

    @property
    def mark(self) -> str:
        """Its kind and host, and a few digits that tell it from others."""
        digits = hashlib.sha256(f"{self.kind} {self.address}".encode()).hexdigest()[:8]
        where = self.address if self.kind == "mail" else urlsplit(self.address).hostname or ""
        return f"{self.kind} {where} {digits}"[:200]

    def tell(self, body: Mapping[str, object]) -> None:
        """Raises: NotTold."""
        if self.kind == "mail":
            _mail(self.address, self.mail, body)
        else:
            _post(self.address, as_slack(body) if self.kind == "slack" else body)


def destinations(app: AmqTask) -> dict[str, Destination]:
    """Those of `console_alert_to`, by mark. Raises: ConfigurationError."""
    configured = [_destination(str(written), app.conf.console_mail) for written in app.conf.console_alert_to or ()]
    return {one.mark: one for one in configured}


def _destination(written: str, mail: Mapping[str, object]) -> Destination:
    parts = urlsplit(written)
    if parts.scheme == "mailto" and "@" in parts.path and printable(parts.path) == parts.path:
        _check_mail(mail)
        return Destination("mail", unquote(parts.path), mail)
    scheme = parts.scheme.removeprefix("slack+")
    if scheme in ("http", "https") and parts.hostname:
        kind = "slack" if scheme != parts.scheme or parts.hostname == _SLACK_HOST else "webhook"
        return Destination(kind, written.removeprefix("slack+"), {})
    raise ConfigurationError(
        "console_alert_to takes https://… (a webhook), slack+https://… and mailto:name@host, not one that begins with "
        f"{parts.scheme or 'no scheme'}"
    )


def _check_mail(mail: Mapping[str, object]) -> None:
    if not mail.get("host") or not mail.get("from"):
        raise ConfigurationError("console_alert_to has a mailto:, so console_mail needs host and from")
    if unknown := sorted(set(mail) - _MAIL_FIELDS):
        raise ConfigurationError(f"console_mail has no {', '.join(unknown)}; it has {', '.join(sorted(_MAIL_FIELDS))}")
    if mail.get("tls") not in (None, False, True, "starttls", "ssl"):
        raise ConfigurationError("console_mail['tls'] is 'starttls', 'ssl', or None")


def title(body: Mapping[str, object]) -> str:
    """In one line."""
    label = {"firing": "FIRING", "resolved": "RESOLVED"}.get(str(body.get("state")), "TEST")
    return printable(f"[{body.get('app')}] {label} {body.get('rule')}: {body.get('text')}")


def as_slack(body: Mapping[str, object]) -> dict[str, object]:
    """An incoming webhook's message (https://docs.slack.dev/messaging/formatting-message-text#escaping)."""
    text = title(body).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    sign = {"firing": ":red_circle:", "resolved": ":large_green_circle:"}.get(str(body.get("state")), ":bell:")
    url = body.get("url")
    return {"text": f"{sign} {text}" + (f"\n<{url}|Look>" if url else "")}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A webhook that moved is told of as an error: elsewhere the body would be lost, and the address may be anybody's."""

    def redirect_request(self, *args: object, **options: object) -> None:
        return None


def _post(url: str, body: Mapping[str, object]) -> None:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json", "User-Agent": "amqtask"}
    )
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=ANSWER_SECONDS) as answer:
            answer.read(1)
    except urllib.error.HTTPError as error:
        raise NotTold(f"HTTP status {error.code}") from error
    except OSError as error:
        raise NoAnswer(f"{getattr(error, 'reason', None) or error}") from error
    except (http.client.HTTPException, ValueError) as error:
        raise NotTold(str(error)) from error


def _mail(address: str, mail: Mapping[str, object], body: Mapping[str, object]) -> None:
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = str(mail["from"]), address, title(body)[:200]
    lines = [
        f"{name}: {printable(str(body[name]))}"
        for name in ("state", "rule", "subject", "since", "until", "url")
        if body.get(name)
    ]
    message.set_content("\n".join([printable(str(body.get("text"))), "", *lines, ""]))
    host, port = str(mail["host"]), int(str(mail.get("port") or 0))
    try:
        if mail.get("tls") == "ssl":
            context = ssl.create_default_context()
            server: smtplib.SMTP = smtplib.SMTP_SSL(host, port, timeout=ANSWER_SECONDS, context=context)
        else:
            server = smtplib.SMTP(host, port, timeout=ANSWER_SECONDS)
        with server:
            if mail.get("tls") in ("starttls", True):
                server.starttls(context=ssl.create_default_context())
            if mail.get("user"):
                server.login(str(mail["user"]), str(mail.get("password") or ""))
            server.send_message(message)
    except (smtplib.SMTPException, ValueError) as error:
        is_answer = not isinstance(error, smtplib.SMTPServerDisconnected)
        raise (NotTold if is_answer else NoAnswer)(str(error)) from error
    except OSError as error:  # an SMTPException is one, too
        raise NoAnswer(str(error)) from error
