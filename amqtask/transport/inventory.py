"""Check entities, or declare them, over AMQP, one after the other, for `amqtask topology`.

AMQP 0-9-1 can ask whether a queue or exchange exists (a passive declare), and refuses a declaration with other arguments,
naming the first one that differs. It cannot ask about bindings.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from amqtask.exceptions import OperationalError, QueueNotFound, TopologyMismatch
from amqtask.protocol.entities import Binding, Declaration, Exchange, Queue
from amqtask.topology.compare import Finding
from amqtask.topology.declarations import first_difference
from amqtask.transport.contract import Admin
from amqtask.transport.declare import entity_name
from amqtask.transport.errors import NOT_FOUND, PRECONDITION_FAILED, declare_error

NOT_ASKED = "AMQP has no question about bindings; --api asks the management plugin"


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
    if refusal.reply_code == NOT_FOUND:
        raise QueueNotFound(f"there is no {entity_name(entity)} on this broker.")
    raise declare_error(entity_name(entity), refusal)
