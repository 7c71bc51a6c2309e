"""The commands about revoking: revoke, terminate, revoke_by_stamped_headers, revoked, and hello, with which workers exchange
their revokes (celery/worker/control.py)."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Container, Iterable, Mapping
from typing import TYPE_CHECKING

from amqtask.exceptions import ConfigurationError
from amqtask.ground.printable import bounded_logger
from amqtask.worker.revoked import Revocations, Stamp, stamps_in

if TYPE_CHECKING:
    from amqtask.execution.request import Request
    from amqtask.ground.shapes import CommandArguments, JsonFields, JsonObject
    from amqtask.services.command_context import Control

logger = bounded_logger("amqtask.worker")


def revoked(control: Control, arguments: CommandArguments) -> object:
    return list(control.worker.revoked.ids)


def hello(control: Control, arguments: CommandArguments) -> object:
    """A worker that starts sends its revokes and asks for ours."""
    if arguments.get("from_node") == control.worker.setup.hostname:
        return None
    after = arguments.get("revoked_after")
    answer = revoked_state(
        control, after=float(after) if after else 0.0, without=frozenset(arguments.get("revoked") or ())
    )
    learn_revoked(control, arguments)
    return {**answer, "clock": control.clock}


def revoked_state(control: Control, *, after: float = 0.0, without: Container[str] = ()) -> JsonObject:
    """The revokes of a `hello`, in both directions: ids as Celery 5.7 sends them, beside them fields that only we use.

    Only those that were revoked `after` that Unix time, and `without` the ids that the other worker has: lists may be long.
    """
    revocations = control.worker.revoked
    ids = {task_id: since for task_id, since in revocations.ids.items() if since >= after and task_id not in without}
    stamps = [[name, value, since] for (name, value), since in revocations.stamps.items() if since >= after]
    return {"revoked": list(ids), "revoked_at": list(ids.values()), "revoked_stamps": stamps}


def learn_revoked(control: Control, state: JsonFields) -> None:
    """Take over the revokes of another worker; Celery's workers send only ids, or times that mean nothing here."""
    ids, times = list(state.get("revoked") or ()), state.get("revoked_at")
    if not isinstance(times, list) or len(times) != len(ids):
        times = [time.time()] * len(ids)
    stamps = {(str(name), value): float(since) for name, value, since in state.get("revoked_stamps") or ()}
    control.operations.learn_revoked({str(key): float(since) for key, since in zip(ids, times, strict=True)}, stamps)


def revoke(control: Control, arguments: CommandArguments) -> object:
    ids = _ids(arguments)
    if not ids:
        return {"error": "no task id was given"}
    if arguments.get("terminate"):
        return _terminate(control, arguments, lambda: control.operations.revoke(ids), lambda request: request.id in ids)
    control.operations.revoke(ids)
    logger.info("Tasks flagged as revoked: %s", ", ".join(ids))
    return {"ok": f"tasks {', '.join(ids)} flagged as revoked"}


def revoke_by_stamped_headers(control: Control, arguments: CommandArguments) -> object:
    headers = _by_name(arguments.get("headers"))
    stamps = dict.fromkeys(stamps_in(headers))
    if not stamps:
        return {"error": "no stamp was given: headers is {name: value or list of values}"}
    if arguments.get("terminate"):
        revocations = Revocations()
        revocations.add_stamps(stamps, time.time())
        return _terminate(
            control,
            arguments,
            lambda: control.operations.revoke_stamps(stamps),
            lambda request: revocations.covers(request.id, request.headers),
            otherwise=f"headers {headers} were not terminated",
        )
    control.operations.revoke_stamps(stamps)
    logger.info("Stamps flagged as revoked: %s", _spelled(stamps))
    return {"ok": f"headers {headers} flagged as revoked, but not terminated"}


def terminate(control: Control, arguments: CommandArguments) -> object:
    return revoke(control, {**arguments, "terminate": True})


def _terminate(
    control: Control,
    arguments: CommandArguments,
    flag: Callable[[], list[Request]],
    matches: Callable[[Request], bool],
    otherwise: str = "terminate: tasks unknown",
) -> object:
    """Revoke waiting requests and end running ones; neither when there is no such signal. `otherwise` is the reply when no
    request was here."""
    signum = signal_number(arguments.get("signal"))
    stopped = [request for request in flag() if matches(request)]
    ended, going_on = control.operations.terminate(matches, signum)
    if any(control.operations.find(request) is not None for request in going_on):
        names = ", ".join(request.id for request in going_on)
        return {"error": f"the {control.worker.pool.name} pool cannot end what runs: {names}"}
    names = ", ".join(dict.fromkeys(request.id for request in (*ended, *stopped)))
    logger.info("Terminating %s (%s)", names or "nothing that is here", arguments.get("signal") or "SIGTERM")
    return {"ok": f"terminate: {names}" if names else otherwise}


def signal_number(signal_name: object) -> int | None:
    """SIGTERM, TERM, 15 or "15" as a number; None for nothing. Raises: ConfigurationError."""
    if signal_name in (None, ""):
        return None
    upper_name = str(signal_name).upper()
    try:
        if upper_name.isdigit():
            return int(signal.Signals(int(upper_name)))
        return int(signal.Signals[upper_name if upper_name.startswith("SIG") else f"SIG{upper_name}"])
    except (KeyError, ValueError):
        raise ConfigurationError(f"there is no signal {signal_name!r} (it is like SIGTERM, KILL or 9)") from None


def _ids(arguments: CommandArguments) -> dict[str, None]:
    """The task ids, each once, in the given order."""
    task_ids = arguments.get("task_id") or arguments.get("task_ids") or ()
    return dict.fromkeys([task_ids] if isinstance(task_ids, str) else [str(task_id) for task_id in task_ids])


def _by_name(headers: object) -> dict[str, object]:
    """Stamps by their names, from a mapping, or from the command line's `name=value` arguments."""
    if isinstance(headers, Mapping):
        return {str(name): value for name, value in headers.items()}
    if isinstance(headers, (list, tuple)):
        pairs = [str(argument).partition("=") for argument in headers]
        return {
            name: [value for other, separator, value in pairs if separator and other == name]
            for name, separator, _ in pairs
            if separator
        }
    return {}


def _spelled(stamps: Iterable[Stamp]) -> str:
    return ", ".join(f"{name}={value}" for name, value in stamps)
