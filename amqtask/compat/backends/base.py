"""`celery.backends.base`: result stores that were written for Celery derive from these, and are stores of ours thereby.

Such a class says how it stores (`_store_result`, `_get_task_meta_for`, `_forget` …, or `get`, `set` and `delete` of keys), and
`result_backend = "module:Class"` names it. Who waits for its results asks again and again (amqtask.backends.polling).
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias
from uuid import UUID

from amqtask import states
from amqtask.backends.contract import BackendOptions, MadeForApp, key_prefix
from amqtask.backends.polling import PollingBackend
from amqtask.compat._state import get_current_task
from amqtask.compat.stores import Asked, Meta, message_of_meta, request_of
from amqtask.compat.utils.serialization import get_pickleable_exception, get_pickled_exception
from amqtask.exceptions import BackendNotConfigured, BackendUnreachable, EncodeError, MessageError
from amqtask.ground.current import current_app
from amqtask.ground.loop import exponential_backoff
from amqtask.ground.printable import bounded_logger, mask_urls
from amqtask.protocol.result import ResultMessage, exception_as_dict, exception_from_dict
from amqtask.protocol.serialization import content_type, content_types, dumps, loads
from amqtask.result import AsyncResult, result_from_tuple
from amqtask.results import GroupResult, ResultSet

if TYPE_CHECKING:
    from amqtask.ground.shapes import Arguments, Keywords

__all__ = [
    "Backend", "BaseBackend", "BaseDictBackend", "DisabledBackend", "KeyValueStoreBackend", "SyncBackendMixin",
    "get_current_task", "unpickle_backend",
]  # fmt: skip

logger = bounded_logger("amqtask.backends")


class BaseBackend(Asked, PollingBackend, MadeForApp):
    """To derive from. Made with `app=` as Celery does; `expires` is seconds or a timedelta, `accept` names serializers.

    A store adds `_store_result(task_id, result, state, traceback, request)`, `_get_task_meta_for(task_id)`,
    `_forget(task_id)`, and for groups `_save_group`, `_restore_group`, `_delete_group`.
    """

    def __init__(
        self,
        app: Any = None,
        serializer: str | None = None,
        max_cached_results: int | None = None,
        accept: Iterable[str] | None = None,
        expires: float | timedelta | None = None,
        expires_type: Callable[[Any], Any] | None = None,
        url: str | None = None,
        **kwargs: object,
    ) -> None:
        self.app = app or current_app()
        conf = self.app.conf
        super().__init__(
            BackendOptions(url or "", transport_options=tuple(conf.result_backend_transport_options.items()))
        )
        self.serializer: str = serializer or conf.result_serializer
        _, self.content_type, self.content_encoding = dumps(None, self.serializer)
        self.accept = content_types(accept or conf.result_accept_content or conf.accept_content)
        self.expires = self.prepare_expires(expires, expires_type)
        self.always_retry = bool(conf.result_backend_always_retry)
        self.max_retries: float = (
            math.inf if conf.result_backend_max_retries is None else conf.result_backend_max_retries
        )
        self.base_sleep_between_retries_ms = conf.result_backend_base_sleep_between_retries_ms
        self.max_sleep_between_retries_ms = conf.result_backend_max_sleep_between_retries_ms
        self.url = url
        # What was read is kept by results, not here.
        self._cache: dict[str, Any] = {}

    # -- what a store adds

    def _store_result(
        self, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None, **kwargs: object
    ) -> Any:
        raise NotImplementedError(f"{type(self).__name__} does not say how a result is stored: _store_result")

    def _get_task_meta_for(self, task_id: str) -> Meta:
        raise NotImplementedError(f"{type(self).__name__} does not say how a result is read: _get_task_meta_for")

    def _forget(self, task_id: str) -> Any:
        raise NotImplementedError(f"{type(self).__name__} does not say how a result is deleted: _forget")

    def _save_group(self, group_id: str, result: GroupResult) -> Any:
        raise BackendNotConfigured(f"{type(self).__name__} keeps no groups: it has no _save_group")

    def _restore_group(self, group_id: str) -> Meta | None:
        raise BackendNotConfigured(f"{type(self).__name__} keeps no groups: it has no _restore_group")

    def _delete_group(self, group_id: str) -> Any:
        raise BackendNotConfigured(f"{type(self).__name__} keeps no groups: it has no _delete_group")

    def exception_safe_to_retry(self, exc: BaseException) -> bool:
        """Whether another attempt may do better, with `result_backend_always_retry`."""
        return False

    def on_backend_retryable_error(self, exc: BaseException) -> None:
        """Called before another attempt."""

    # -- Celery's end

    def store_result(
        self, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None, **kwargs: Any
    ) -> Any:
        """Store a value, an exception or a meta; as it was encoded."""
        encoded = self.encode_result(result, state)
        self._ensure_retryable(
            self._store_result,
            task_id,
            encoded,
            state,
            traceback,
            fallback_exc=partial(BackendUnreachable, task_id=task_id, state=state),
            fallback_msg="failed to store result on the backend",
            request=request,
            **kwargs,
        )
        return encoded

    def get_task_meta(self, task_id: str, cache: bool = True) -> Meta:
        """What is stored; PENDING where nothing is."""
        meta: Meta = self._ensure_retryable(
            self._get_task_meta_for,
            task_id,
            fallback_exc=partial(BackendUnreachable, task_id=task_id),
            fallback_msg="failed to get meta",
        )
        return meta

    def reload_task_result(self, task_id: str) -> None:
        """Nothing is kept here that could be old."""

    reload_group_result = reload_task_result

    def get_group_meta(self, group_id: str, cache: bool = True) -> Meta | None:
        """What is stored of a group."""
        meta: Meta | None = self._ensure_retryable(self._restore_group, group_id)
        return meta

    def _ensure_retryable(
        self,
        func: Callable[..., Any],
        *args: object,
        fallback_exc: Any = None,
        fallback_msg: str | None = None,
        max_retries: float | None = None,
        **kwargs: object,
    ) -> Any:
        limit = self.max_retries if max_retries is None else max_retries
        retries = 0
        while True:
            try:
                return func(*args, **kwargs)
            except Exception as error:  # the store says which errors pass
                if not self.always_retry or not self.exception_safe_to_retry(error):
                    raise
                if retries >= limit:
                    raise (fallback_exc(fallback_msg) if fallback_exc else error) from error
                logger.warning("%s cannot be asked, trying again: %r", type(self).__name__, error)
                self._tell_hook(error)
            self._sleep(self._pause(retries))
            retries += 1

    def _tell_hook(self, error: Exception) -> None:
        try:
            self.on_backend_retryable_error(error)
        except Exception:  # a store's own method
            logger.exception("on_backend_retryable_error of %s failed", type(self).__name__)

    def _sleep(self, amount: float) -> None:
        time.sleep(amount)

    def _pause(self, retries: int) -> float:
        return exponential_backoff(
            retries,
            factor=self.base_sleep_between_retries_ms / 1000,
            maximum=self.max_sleep_between_retries_ms / 1000,
            full_jitter=True,
        )

    # -- values and their form

    def encode(self, data: Any) -> Any:
        """With the store's serializer: text where it writes text."""
        return self._encode(data)[-1]

    def _encode(self, data: Any) -> tuple[str, str, Any]:
        body, mime_type, encoding = dumps(data, self.serializer)
        return mime_type, encoding, body if encoding == "binary" else body.decode()

    def decode(self, payload: Any) -> Any:
        """What `encode` wrote. Raises: MessageError; kombu's DecodeError where kombu is imported."""
        if payload is None:
            return None
        mime_type = content_type(self.serializer)
        encoding = "binary" if self.content_encoding == "binary" else "utf-8"
        try:
            return loads(
                payload.encode() if isinstance(payload, str) else payload,
                mime_type,
                encoding,
                self.accept | {mime_type},
            )
        except MessageError as error:
            kombu = sys.modules.get("kombu.exceptions")
            if kombu is None:
                raise
            raise kombu.DecodeError(str(error)) from error

    def decode_result(self, payload: Any) -> Meta:
        """The meta that `encode` wrote."""
        return self.meta_from_decoded(self.decode(payload))

    def meta_from_decoded(self, meta: Meta) -> Meta:
        """The meta with an exception in place of its description."""
        if meta["status"] in self.EXCEPTION_STATES:
            meta["result"] = self.exception_to_python(meta["result"])
        return meta

    def encode_result(self, result: Any, state: str) -> Any:
        """A value or an exception as it is stored."""
        if state in self.EXCEPTION_STATES and isinstance(result, BaseException):
            return self.prepare_exception(result)
        return self.prepare_value(result)

    def prepare_exception(self, exc: BaseException, serializer: str | None = None) -> Any:
        """An exception itself where results are pickled, else as data."""
        used = serializer or self.serializer
        return get_pickleable_exception(exc) if used == "pickle" else exception_as_dict(exc, used)

    def exception_to_python(self, exc: Any) -> BaseException | None:
        """The exception that `prepare_exception` wrote."""
        if not exc:
            return None
        return get_pickled_exception(exc) if isinstance(exc, BaseException) else exception_from_dict(exc)

    def prepare_value(self, result: Any) -> Any:
        """A result that a task returned is data."""
        is_result = isinstance(result, (AsyncResult, ResultSet))
        return result.as_tuple() if is_result and self.serializer != "pickle" else result

    def prepare_expires(self, value: Any, type: Callable[[Any], Any] | None = None) -> Any:
        """Seconds; the setting where `value` is None."""
        expires = self.app.conf.result_expires if value is None else value
        if isinstance(expires, timedelta):
            expires = expires.total_seconds()
        return type(expires) if expires is not None and type is not None else expires

    def prepare_persistent(self, enabled: bool | None = None) -> bool:
        """Whether results outlive the store's restart."""
        is_persistent = self.app.conf.result_persistent if enabled is None else enabled
        return self.persistent if is_persistent is None else bool(is_persistent)

    def _get_result_meta(
        self, result: Any, state: str, traceback: Any, request: Any, format_date: bool = True, encode: bool = False
    ) -> Meta:
        done = self.app.now() if state in self.READY_STATES else None
        meta: Meta = {
            "status": state,
            "result": result,
            "traceback": traceback,
            "children": self.current_task_children(request),
            "date_done": done.isoformat() if done is not None and format_date else done,
        }
        for name, attribute in (("group_id", "group"), ("parent_id", "parent_id")):
            if getattr(request, attribute, None):
                meta[name] = getattr(request, attribute)
        if request is not None and self.app.conf.result_extended:
            meta |= self._call_of(request, encode)
        return meta

    def _call_of(self, request: Any, encode: bool) -> Meta:
        call = {
            "name": getattr(request, "task", None),
            "args": getattr(request, "args", None),
            "kwargs": getattr(request, "kwargs", None),
            "worker": getattr(request, "hostname", None),
            "retries": getattr(request, "retries", None),
            "queue": (getattr(request, "delivery_info", None) or {}).get("routing_key"),
        }
        if encode:
            call |= {name: _as_bytes(self.encode(call[name])) for name in ("args", "kwargs")}
        names = getattr(request, "stamped_headers", None) or ()
        stamps = getattr(request, "stamps", None) or {}
        return call | ({"stamped_headers": names, **{name: stamps.get(name) for name in names}} if stamps else {})

    def as_uri(self, include_password: bool = False) -> str:
        """Where results are, for people."""
        return (self.url or "") if include_password else mask_urls(self.url or "")

    def add_to_chord(self, chord_id: str, result: Any) -> Any:
        """For who calls it by hand. Raises: NotImplementedError."""
        raise NotImplementedError("Backend does not support add_to_chord")

    def apply_chord(self, header_result_args: Any, body: Any, **kwargs: object) -> Any:
        """Do nothing: the members' messages carry the body."""

    def __reduce__(self, args: Arguments = (), kwargs: Keywords | None = None) -> Any:
        return unpickle_backend, (type(self), args, dict(kwargs or {}))

    # -- our end (amqtask.backends.contract)

    def store(self, result: ResultMessage) -> None:
        """Store a worker's result. Raises: EncodeError, BackendUnreachable."""
        try:
            self.store_result(
                result.task_id, result.result, result.status, traceback=result.traceback, request=request_of(result)
            )
            self.process_cleanup()
        except (EncodeError, BackendUnreachable):
            raise
        except Exception as error:  # each library has errors of its own
            raise BackendUnreachable(f"{type(self).__name__} cannot store a result: {error!r}") from error

    def read(self, task_ids: Sequence[str]) -> Iterable[ResultMessage]:
        """Read results one by one. Raises: BackendUnreachable."""
        try:
            messages = [message_of_meta(task_id, self.get_task_meta(task_id)) for task_id in task_ids]
        except Exception as error:  # whatever the store's library raises
            raise BackendUnreachable(f"{type(self).__name__} cannot be asked for results: {error!r}") from error
        return [message for message in messages if message is not None]

    def forget(self, task_id: str) -> None:
        """Delete the result."""
        self._ensure_retryable(self._forget, task_id)

    def save_group(self, group_id: str, result: Any) -> Any:
        """Keep a group's members, given as a result or as data."""
        return self._ensure_retryable(self._save_group, group_id, result_from_tuple(result, app=self.app))

    def restore_group(self, group_id: str, cache: bool = True) -> Any:
        """The group that was kept; None where there is none."""
        meta = self.get_group_meta(group_id, cache=cache)
        return meta["result"] if meta else None

    def delete_group(self, group_id: str) -> Any:
        """Delete the group."""
        return self._ensure_retryable(self._delete_group, group_id)


# Its other names.
Backend: TypeAlias = BaseBackend
BaseDictBackend: TypeAlias = BaseBackend


class SyncBackendMixin:
    """Nothing more: every store can be waited for."""


class KeyValueStoreBackend(BaseBackend):
    """To derive from with `get`, `set` and `delete` of a key (bytes; text where the class says `key_t = str`)."""

    key_t: Callable[[Any], Any] = staticmethod(lambda key: _as_bytes(key))
    task_keyprefix: Any = "celery-task-meta-"
    group_keyprefix: Any = "celery-taskset-meta-"
    chord_keyprefix: Any = "chord-unlock-"
    implements_incr = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        prefix = key_prefix(self.app.conf.result_backend_transport_options)
        key_t = self._key_t
        self.task_keyprefix, self.group_keyprefix, self.chord_keyprefix = (
            key_t(f"{prefix}{keyprefix}")
            for keyprefix in (self.task_keyprefix, self.group_keyprefix, self.chord_keyprefix)
        )

    @property
    def _key_t(self) -> Callable[[Any], Any]:
        # A class or function that is an attribute of the class is no method.
        return getattr(self.key_t, "__func__", self.key_t)

    def get(self, key: Any) -> Any:
        """The value, None where there is none."""
        raise NotImplementedError("Must implement the get method.")

    def mget(self, keys: Sequence[Any]) -> Any:
        """The values, in their order."""
        return [self.get(key) for key in keys]

    def set(self, key: Any, value: Any) -> Any:
        """Write a value."""
        raise NotImplementedError("Must implement the set method.")

    def _set_with_state(self, key: Any, value: Any, state: str) -> Any:
        return self.set(key, value)

    def delete(self, key: Any) -> Any:
        """Delete a value."""
        raise NotImplementedError("Must implement the delete method")

    def incr(self, key: Any) -> int:
        """Increment the number at a key."""
        raise NotImplementedError("Does not implement incr")

    def expire(self, key: Any, value: Any) -> Any:
        """Have a key expire after so many seconds."""

    def get_key_for_task(self, task_id: Any, key: Any = "") -> Any:
        """The key of a task's result."""
        return self._get_key_for(self.task_keyprefix, task_id, key)

    def get_key_for_group(self, group_id: Any, key: Any = "") -> Any:
        """The key of a group's members."""
        return self._get_key_for(self.group_keyprefix, group_id, key)

    def get_key_for_chord(self, group_id: Any, key: Any = "") -> Any:
        """The key under which a chord's parts would be counted."""
        return self._get_key_for(self.chord_keyprefix, group_id, key)

    def _get_key_for(self, prefix: Any, id: Any, key: Any = "") -> Any:
        if not id:
            raise ValueError(f"an id must not be empty: {id!r}")
        key_t = self._key_t
        return key_t("").join([prefix, key_t(str(id) if isinstance(id, UUID) else id), key_t(key)])

    def _forget(self, task_id: str) -> Any:
        return self.delete(self.get_key_for_task(task_id))

    def _store_result(
        self, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None, **kwargs: object
    ) -> Any:
        if self._get_task_meta_for(task_id)["status"] == states.SUCCESS:
            return result  # what a lost worker's task says later does not count
        meta = {**self._get_result_meta(result, state, traceback, request), "task_id": task_id}
        self._set_with_state(self.get_key_for_task(task_id), self.encode(meta), state)
        return result

    def _get_task_meta_for(self, task_id: str) -> Meta:
        value = self.get(self.get_key_for_task(task_id))
        return self.decode_result(value) if value else {"status": states.PENDING, "result": None}

    def _save_group(self, group_id: str, result: GroupResult) -> Any:
        value = self.encode({"result": result.as_tuple()})
        self._set_with_state(self.get_key_for_group(group_id), value, states.SUCCESS)
        return result

    def _restore_group(self, group_id: str) -> Meta | None:
        value = self.get(self.get_key_for_group(group_id))
        if not value:
            return None
        meta: Meta = self.decode(value)
        return {**meta, "result": result_from_tuple(meta["result"], app=self.app)}

    def _delete_group(self, group_id: str) -> Any:
        return self.delete(self.get_key_for_group(group_id))


def unpickle_backend(cls: type[BaseBackend], args: Arguments, kwargs: Keywords) -> BaseBackend:
    """A store of the current application."""
    backend: BaseBackend = cls(*args, **{**kwargs, "app": current_app()})
    return backend


def _as_bytes(value: Any) -> Any:
    return value.encode() if isinstance(value, str) else value


class _NoBackend(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return instance is None or super().__instancecheck__(instance)


class DisabledBackend(metaclass=_NoBackend):
    """What `app.backend` is in Celery when no results are kept: None here, which `isinstance` takes for one."""

    def _is_disabled(self, *_: object, **__: object) -> NoReturn:
        raise BackendNotConfigured("the application keeps no results: set result_backend")

    get_state = get_status = get_result = get_traceback = get_task_meta_for = wait_for = get_many = _is_disabled
