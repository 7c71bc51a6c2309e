"""Where alerts go: a webhook (JSON), Slack's format, or e-mail. Blocking. What strangers have written in them stays text."""

from __future__ import annotations

import hashlib
import http.client
import json
import smtplib
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from email.message import EmailMessage
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from amqtask.exceptions import ConfigurationError, OperationalError
from amqtask.ground.printable import printable

if TYPE_CHECKING:
    from amqtask.app import AmqTask

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
