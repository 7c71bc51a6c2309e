"""What a broker has, beside what is declared: asked over AMQP, and over the management plugin's HTTP API; for the command line.

AMQP 0-9-1 can ask whether a queue or exchange exists (a passive declare), and refuses a declaration with other arguments,
naming the first one that differs. It cannot ask about bindings, rates, unacked messages: the HTTP API can. Its objects are those
of RabbitMQ's `/api/queues`, `/api/exchanges` and `/api/bindings` (https://www.rabbitmq.com/docs/http-api-reference).
"""

from __future__ import annotations

import base64
import email.utils
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple
from urllib.parse import quote, unquote, urlsplit

from amqtask.exceptions import AccessRefused, ConfigurationError, OperationalError, QueueNotFound, TopologyMismatch
from amqtask.ground.printable import clause
from amqtask.protocol.entities import Binding, Declaration, Exchange, Queue
from amqtask.topology.declarations import first_difference, is_declarable
from amqtask.transport.contract import Admin
from amqtask.transport.declare import entity_name
from amqtask.transport.errors import NOT_FOUND, PRECONDITION_FAILED, declare_error, is_away
from amqtask.transport.url import BrokerAddress

if TYPE_CHECKING:
    from amqtask.ground.shapes import JsonFields, JsonObject, QueueArguments


Status = Literal["ok", "created", "missing", "differs", "refused", "unknown"]
IN_ORDER: frozenset[Status] = frozenset({"ok", "created"})
TIMEOUT_SECONDS = 10.0
NOT_ASKED = "AMQP has no question about bindings; --api asks the management plugin"


class Finding(NamedTuple):
    """One entity and whether the broker has it as declared; `detail` says what differs, or why that is not known."""

    entity: Declaration
    status: Status
    detail: str = ""


# -- differences, as text


def compare(
    declarations: Iterable[Declaration],
    queues: Iterable[JsonFields],
    exchanges: Iterable[JsonFields],
    bindings: Iterable[JsonFields],
) -> Iterator[Finding]:
    """A finding for each declared entity, in the same order."""
    queues_there = {str(queue["name"]): queue for queue in queues}
    exchanges_there = {str(exchange["name"]): exchange for exchange in exchanges}
    bindings_there = {_binding_key(binding) for binding in bindings}
    for entity in declarations:
        if isinstance(entity, Binding):
            yield Finding(entity, "ok" if _declared_key(entity) in bindings_there else "missing")
        elif isinstance(entity, Queue):
            yield _compare(entity, queues_there.get(entity.name), _of_queue(entity))
        else:
            yield _compare(entity, exchanges_there.get(entity.name), _of_exchange(entity))


def _compare(entity: Queue | Exchange, existing: QueueArguments | None, declared: QueueArguments) -> Finding:
    if existing is None:
        return Finding(entity, "missing")
    differences = list(_differences(declared, {**existing, **_flat(existing.get("arguments") or {})}))
    return Finding(entity, "differs" if differences else "ok", "; ".join(differences))


def _differences(declared: QueueArguments, existing: QueueArguments) -> Iterator[str]:
    arguments = {name for name in existing if name.startswith("x-") or name == "alternate-exchange"}
    for name in sorted({*declared, *arguments}):
        existing_value, declared_value = existing.get(name), declared.get(name)
        if name == "x-queue-type" and (
            declared_value is None or (existing_value is None and declared_value == "classic")
        ):
            continue  # the broker's default, which newer brokers report as an argument
        if existing_value != declared_value:
            yield f"{name} is {_text(existing_value)}, wanted {_text(declared_value)}"


def _text(value: object) -> str:
    return "not set" if value is None else repr(value)


def _of_queue(queue: Queue) -> JsonObject:
    return {"durable": queue.durable, "auto_delete": queue.auto_delete, **_flat(queue.argument_map)}


def _of_exchange(exchange: Exchange) -> JsonObject:
    properties = {"type": exchange.type, "durable": exchange.durable, "auto_delete": exchange.auto_delete}
    return {**properties, **_flat(dict(exchange.arguments))}


def _flat(arguments: QueueArguments) -> JsonObject:
    """Arguments as JSON has them: a number is a number, whatever its AMQP type."""
    return {name: value for name, value in arguments.items() if value is not None}


def _binding_key(binding: JsonFields) -> tuple[object, ...]:
    return (
        binding["source"],
        binding["destination"],
        binding["destination_type"],
        binding["routing_key"],
        _hashable(binding.get("arguments") or {}),
    )


def _declared_key(binding: Binding) -> tuple[object, ...]:
    destination_type = "exchange" if binding.to_exchange else "queue"
    return (
        binding.source.name, binding.destination, destination_type, binding.routing_key, _hashable(dict(binding.arguments))
    )  # fmt: skip


def _hashable(arguments: QueueArguments) -> tuple[object, ...]:
    return tuple(sorted((name, repr(value)) for name, value in arguments.items()))


def by_kind(
    entities: Iterable[Declaration],
) -> tuple[list[Exchange], list[Queue], list[Binding]]:
    """Exchanges (without the predeclared ones), queues and bindings, each in their order."""
    exchanges: list[Exchange] = []
    queues: list[Queue] = []
    bindings: list[Binding] = []
    for entity in entities:
        if isinstance(entity, Binding):
            bindings.append(entity)
        elif isinstance(entity, Queue):
            queues.append(entity)
        elif is_declarable(entity):
            exchanges.append(entity)
    return exchanges, queues, bindings


# -- over HTTP


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

    def policies(self) -> list[JsonObject]:
        """All policies of the virtual host, and operator policies (`operator`)."""
        return [*self._get("policies"), *(one | {"operator": True} for one in self._get("operator-policies"))]

    def most_queues(self) -> int | None:
        """How many queues the virtual host may have; None: no limit is set."""
        limits = self._get("vhost-limits")
        return next((int(most) for one in limits if (most := one.get("value", {}).get("max-queues", -1)) >= 0), None)

    def nodes(self) -> tuple[list[JsonObject], float | None]:
        """All nodes of the cluster, and by how many seconds the clock of the one that answers is ahead (None: not told)."""
        before = time.time()
        nodes, date = self._ask("nodes")
        said = email.utils.parsedate_to_datetime(date).timestamp() if date else None
        # The header has whole seconds.
        return nodes, None if said is None else said + 0.5 - (before + time.time()) / 2

    def feature_flags(self) -> list[JsonObject]:
        """The cluster's feature flags."""
        return self._ask("feature-flags")[0]

    def permissions(self) -> JsonObject | None:
        """The user's rights in the virtual host; None: an administrator only may ask."""
        try:
            answer, _ = self._ask(f"permissions/{quote(self._vhost, safe='')}/{quote(self._user, safe='')}")
        except AccessRefused:
            return None
        rights: JsonObject = answer  # type: ignore[assignment] # this one is no list
        return rights

    def _get(self, resource: str) -> list[JsonObject]:
        return self._ask(f"{resource}/{quote(self._vhost, safe='')}")[0]

    def _ask(self, path: str) -> tuple[list[JsonObject], str | None]:
        """The answer, and the server's date."""
        request = urllib.request.Request(
            f"{self.safe_url}/api/{path}", headers={"Authorization": f"Basic {self._login}"}
        )
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
                entries: list[JsonObject] = json.load(answer)
                date: str | None = answer.headers.get("date")
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise OperationalError(
                f"no management API answers at {self.safe_url}: {clause(reason)}. Is the plugin on "
                "(rabbitmq-plugins enable rabbitmq_management), and is the port right (15672)?"
            ) from error
        return entries, date

    def _refusal(self, error: urllib.error.HTTPError) -> OperationalError:
        with error:
            code, reason = error.code, error.reason
        if code in (401, 403):
            return AccessRefused(
                f"the management API at {self.safe_url} refused user {self._user!r} ({code} {reason}): the user needs the tag "
                "`monitoring` (rabbitmqctl set_user_tags) and permissions in the virtual host"
            )
        return OperationalError(f"the management API at {self.safe_url} answered {code} {reason}")


# -- over AMQP


def check(admin: Admin, declarations: Iterable[Declaration]) -> Iterator[Finding]:
    """Whether each entity exists as declared; nothing is created or changed."""
    for entity in declarations:
        if isinstance(entity, Binding):
            yield Finding(entity, "unknown", NOT_ASKED)
        else:
            yield _check(admin, entity)


def declare(admin: Admin, declarations: Iterable[Declaration]) -> Iterator[Finding]:
    """Declare each entity; an entity that exists with other arguments is left as it is."""
    for entity in declarations:
        if isinstance(entity, Binding):
            yield _bind(admin, entity)
            continue
        finding = _check(admin, entity)
        yield _create(admin, entity) if finding.status == "missing" else finding


def _check(admin: Admin, entity: Queue | Exchange) -> Finding:
    """First a passive declare. Only an entity that exists is then declared, which changes nothing and tells what differs."""
    try:
        _send(admin, entity, passive=True)
    except QueueNotFound:
        return Finding(entity, "missing")
    except OperationalError as error:
        return Finding(entity, "refused", str(error))
    return _compared(admin, entity)


def _compared(admin: Admin, entity: Queue | Exchange) -> Finding:
    try:
        _send(admin, entity, passive=False)
    except TopologyMismatch as error:
        return Finding(entity, "differs", str(error))
    except OperationalError as error:
        return Finding(entity, "unknown", f"it exists, but its arguments could not be compared: {error}")
    return Finding(entity, "ok")


def _create(admin: Admin, entity: Queue | Exchange) -> Finding:
    try:
        _send(admin, entity, passive=False)
    except (OperationalError, TopologyMismatch) as error:
        return Finding(entity, "refused", str(error))
    return Finding(entity, "created")


def _bind(admin: Admin, binding: Binding) -> Finding:
    try:
        refusal = admin.declare(binding, passive=False)
        if refusal is not None:
            raise declare_error(entity_name(binding), refusal)
    except OperationalError as error:
        return Finding(binding, "refused", str(error))
    return Finding(binding, "ok")


def _send(admin: Admin, entity: Queue | Exchange, *, passive: bool) -> None:
    refusal = admin.declare(entity, passive=passive)
    if refusal is None:
        return
    if refusal.reply_code == PRECONDITION_FAILED:
        raise TopologyMismatch(first_difference(refusal.reply_text) or refusal.reply_text)
    if refusal.reply_code == NOT_FOUND and not is_away(refusal):
        raise QueueNotFound(f"there is no {entity_name(entity)} on this broker.")
    raise declare_error(entity_name(entity), refusal)
