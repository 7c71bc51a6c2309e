"""RabbitMQ's management HTTP API, for questions that AMQP does not have: bindings, arguments, rates, unacked messages."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit

from amqtask.exceptions import AccessRefused, ConfigurationError, OperationalError
from amqtask.ground.printable import clause
from amqtask.transport.url import BrokerAddress

if TYPE_CHECKING:
    from amqtask.ground.shapes import JsonObject

TIMEOUT_SECONDS = 10.0


class ManagementApi:
    """`url` is e.g. http://host:15672; without a user in it, the broker URL's user and password are taken.

    The virtual host is the broker URL's. Raises, at each question: OperationalError, AccessRefused.
    """

    def __init__(self, url: str, address: BrokerAddress) -> None:
        split = urlsplit(url)
        if split.scheme not in ("http", "https") or not split.hostname:
            raise ConfigurationError(f"--api {url!r} is no URL of the management plugin, e.g. http://localhost:15672")
        host = f"[{split.hostname}]" if ":" in split.hostname else split.hostname
        port = f":{split.port}" if split.port else ""
        self.safe_url = f"{split.scheme}://{host}{port}{split.path.rstrip('/')}"
        user = unquote(split.username) if split.username else address.user
        password = unquote(split.password or "") if split.username else address.password
        self._user = user
        self._login = base64.b64encode(f"{user}:{password}".encode()).decode()
        self._vhost = address.vhost

    def queues(self) -> list[JsonObject]:
        """All queues of the virtual host."""
        return self._get("queues")

    def exchanges(self) -> list[JsonObject]:
        """All exchanges of the virtual host."""
        return self._get("exchanges")

    def bindings(self) -> list[JsonObject]:
        """All bindings of the virtual host, those of the default exchange too (source "")."""
        return self._get("bindings")

    def _get(self, resource: str) -> list[JsonObject]:
        url = f"{self.safe_url}/api/{resource}/{quote(self._vhost, safe='')}"
        request = urllib.request.Request(url, headers={"Authorization": f"Basic {self._login}"})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
                entries: list[JsonObject] = json.load(answer)
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise OperationalError(
                f"no management API answers at {self.safe_url}: {clause(reason)}. Is the plugin on "
                "(rabbitmq-plugins enable rabbitmq_management), and is the port right (15672)?"
            ) from error
        return entries

    def _refusal(self, error: urllib.error.HTTPError) -> OperationalError:
        with error:
            code, reason = error.code, error.reason
        if code in (401, 403):
            return AccessRefused(
                f"the management API at {self.safe_url} refused user {self._user!r} ({code} {reason}): the user needs the tag "
                "`monitoring` (rabbitmqctl set_user_tags) and permissions in the virtual host"
            )
        return OperationalError(f"the management API at {self.safe_url} answered {code} {reason}")
