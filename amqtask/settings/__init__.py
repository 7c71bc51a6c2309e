"""Settings: one typed object from objects, modules, namespaces and Celery's old names; others' names are kept."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from amqtask.exceptions import ConfigurationError, SettingUnknown, WrongValue
from amqtask.ground.django_project import django_time_zone
from amqtask.ground.plugins import load, near_names, plugins
from amqtask.ground.printable import bounded_logger, described, is_secret, masked
from amqtask.protocol import option_types
from amqtask.protocol.compression import COMPRESSIONS, compression_type
from amqtask.protocol.encryption import KeysSaid, read_keys, use_keys
from amqtask.protocol.option_types import Kind, convert
from amqtask.protocol.serialization import SERIALIZERS, content_type
from amqtask.settings.table import FOREIGN, SETTINGS, Setting
from amqtask.topology.slots import WANTED, slots_by_queue

if TYPE_CHECKING:
    from amqtask.ground.shapes import SettingDict, SettingValues


_MISSING = object()
logger = bounded_logger("amqtask.settings")
_TABLE: dict[str, Setting] = {setting.name: setting for setting in SETTINGS}
_OLD: dict[str, str] = {setting.old: setting.name for setting in SETTINGS if setting.old}
# Names that the tutorials use and that are in no table of Celery's.
_OLD.update(
    {
        "CELERY_BACKEND_URL": "result_backend",
        "CELERYD_LOG_FILE": "worker_log_file",
        "CELERYD_FORCE_EXECV": "worker_force_execv",
        "CELERYBEAT_LOG_FILE": "beat_log_file",
        "CELERY_ENABLE_UTC": "enable_utc",
        "CELERYD_PREFETCH_MULTIPLIER": "worker_prefetch_multiplier",
        "CELERY_DISABLE_RATE_LIMITS": "worker_disable_rate_limits",
    }
)
# db_reuse_max: Celery's workers count tasks per database connection of Django's; here CONN_MAX_AGE decides, as in requests.
_NO_EFFECT = frozenset({"worker_log_file", "worker_force_execv", "beat_log_file", "db_reuse_max"}) | frozenset(
    f"{program}_{name}"
    for program in ("worker", "beat", "events")
    for name in ("logfile", "pidfile", "uid", "gid", "umask", "executable")
)
# Variables that count more than what is set, as in Celery.
_OF_ENVIRONMENT = {
    name: f"CELERY_{name.upper()}" for name in ("broker_url", "broker_read_url", "broker_write_url", "result_backend")
}
# How alike a name must be to one of ours to be reported as a slip. (Names of other libraries may begin as ours do.)
_ALIKE = 0.8
# What a name in a module must look like to count as a setting of ours when no namespace says so.
_PREFIXES = (
    "accept_", "beat_", "broker_", "console_", "control_", "enable_utc", "event_", "history_", "imports", "include",
    "result_", "security_",
    "task_", "timezone", "worker_", "celery",
)  # fmt: skip


class ForeignSettings(MutableMapping[str, Any]):
    """Settings of other libraries and of the application, found by their name, in capitals, or with the namespace in front:
    `conf.once_timeout` is `CELERY_ONCE_TIMEOUT`. A source is asked for a name only when somebody looks for it: Django refuses
    to give some settings that are not set.
    """

    def __init__(self) -> None:
        # Names that were set one by one, or in a namespace of ours.
        self.explicit: SettingDict = {}
        self._kept: dict[str, object] = {}
        # Sources that were read, each with the prefix of its names; the last one first.
        self._sources: list[tuple[object, str]] = []

    def add_source(self, source: object, namespace: str | None) -> None:
        """A module, object or mapping that was read."""
        self._sources.insert(0, (source, f"{namespace.rstrip('_')}_" if namespace else ""))

    def keep(self, name: str, value: object) -> None:
        """Keep an entry of a configuration that belongs to another program."""
        self._kept[name] = value

    @property
    def _prefixes(self) -> list[str]:
        return list(dict.fromkeys(prefix for _, prefix in self._sources if prefix))

    def bare(self, name: str) -> str:
        """The name in small letters, without a namespace of ours."""
        prefix = next((prefix for prefix in self._prefixes if name.startswith(prefix)), "")
        return name[len(prefix) :].lower()

    def _spellings(self, name: str) -> Iterator[str]:
        yield name
        yield from (f"{prefix}{name.upper()}" for prefix in self._prefixes)
        yield from (name.upper(), name.lower(), self.bare(name))

    def __getitem__(self, name: str) -> Any:
        sources = [self.explicit, self._kept, *(source for source, _ in self._sources)]
        for spelling in dict.fromkeys(self._spellings(name)):
            for source in sources:
                value = source.get(spelling, _MISSING) if isinstance(source, Mapping) else _attribute(source, spelling)
                if value is not _MISSING:
                    return value
        raise KeyError(name)

    def __setitem__(self, name: str, value: object) -> None:
        self.explicit[name] = value

    def __delitem__(self, name: str) -> None:
        del self.explicit[name]

    def __iter__(self) -> Iterator[str]:
        """With a namespace only the names in it: others of Django's settings may not be asked for."""
        names = {**self.explicit, **self._kept}
        for source, prefix in self._sources:
            attributes = source if isinstance(source, Mapping) else dir(source)
            names.update(
                dict.fromkeys(name for name in attributes if name.startswith(prefix) and not name.startswith("_"))
            )
        return iter(names)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def clear(self) -> None:
        """Forget all names and sources."""
        for names in (self.explicit, self._kept, self._sources):
            names.clear()

    def forget_sources(self) -> None:
        """Forget what was read."""
        self._sources.clear()


def _attribute(source: object, name: str) -> object:
    return _MISSING if name.startswith("_") else getattr(source, name, _MISSING)


def find_name(name: str) -> str | None:
    """The lower-case name of a setting from any of its spellings; None when it is none."""
    if name in _TABLE or name in FOREIGN or name in _NO_EFFECT:
        return name
    if name in _OLD:
        return _OLD[name]
    lower = name.lower()
    for candidate in (lower, lower.removeprefix("celery_"), lower.removeprefix("celeryd_")):
        if candidate in _TABLE or candidate in FOREIGN or candidate in _NO_EFFECT:
            return candidate
    return _OLD.get(name.upper())


def near_setting(name: str, alike: float = _ALIKE) -> str | None:
    """The setting that was meant, if it is one."""
    return next(iter(near_names(name.lower().removeprefix("celery_"), _TABLE, alike=alike)), None)


class Settings(MutableMapping[str, Any]):
    """`conf.name`, `conf["name"]`, `conf.update(…)`; values that were not set are the table's defaults.

    Names that are none of ours (a library's, the application's own) can be set and read, too. One that is like a setting is
    told in a warning, or, with `strict_settings`, an error.
    Raises: SettingUnknown (an AttributeError, so hasattr works) for a name that nobody has set, WrongValue.
    """

    def __init__(self) -> None:
        self.__dict__["_values"] = {}
        self.__dict__["_foreign"] = ForeignSettings()
        # A configuration that is read when the first setting is asked for (lazy, as with Celery and Django).
        self.__dict__["_pending"] = []
        # What the application was made with, or set before anything was looked at: it stays when a configuration is read.
        self.__dict__["_own"] = {}
        self.__dict__["_is_looked_at"] = False
        # What the last configuration said.
        self.__dict__["_read"] = {}
        self.__dict__["on_change"] = None

    # -- access

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = self._get(name)
        # As in Celery, whose `conf["timezone"]` is what was set.
        return value or django_time_zone() if name == "timezone" else value

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "on_change":
            self.__dict__[name] = value
        else:
            self[name] = value

    def __getitem__(self, name: str) -> Any:
        try:
            return self._get(name)
        except SettingUnknown as error:
            raise KeyError(str(error)) from error

    def __setitem__(self, name: str, value: object) -> None:
        self._load(is_look=False)
        setting_name = find_name(name)
        if setting_name is None:
            self._set_foreign({name: value})
            return
        self._set(setting_name, value)
        self._changed()

    def _set(self, name: str, value: object) -> None:
        setting = _TABLE.get(name)
        self._values[name] = value if setting is None else _coerce(setting, value)
        if not self._is_looked_at:
            self._own[name] = self._values[name]
        if name == "encryption_keys":
            use_keys(lambda: KeysSaid(self.encryption_keys, self.encryption_key_id))

    def _set_foreign(self, foreign: SettingValues) -> None:
        """Set names that are no settings of ours, and warn of slips. Raises: SettingUnknown with `strict_settings`."""
        if foreign and self._values.get("strict_settings"):
            raise self._unknown(*foreign)
        new = [name for name in foreign if name not in self._foreign.explicit]
        slips = [f"{name} (did you mean {near}?)" for name in new if (near := near_setting(self._foreign.bare(name)))]
        if slips:
            logger.warning("kept for other libraries, but these are not settings of amqtask: %s", ", ".join(slips))
        self._foreign.update(foreign)

    def _of_celery(self, name: str) -> object:
        try:
            return plugins().celery_attribute(self, name)
        except AttributeError:
            raise self._unknown(name) from None

    def _unknown(self, *names: str) -> SettingUnknown:
        near = [repr(nearest) for name in names if (nearest := near_setting(self._foreign.bare(name), 0.6))]
        hint = f"Did you mean {', '.join(near)}?" if near else "See docs/settings.md for all of them."
        return SettingUnknown(f"there is no setting {' and no '.join(map(repr, names))}. {hint}")

    def __delitem__(self, name: str) -> None:
        setting_name = find_name(name)
        if setting_name is None:
            self._foreign.explicit.pop(name, None)
            return
        self._values.pop(setting_name, None)
        self._own.pop(setting_name, None)
        self._changed()

    def clear(self) -> None:
        """Delete all settings that were set."""
        self._load()
        self._values.clear()
        self._own.clear()
        self._foreign.clear()
        self._changed()

    def __iter__(self) -> Iterator[str]:
        yield from _TABLE
        yield from (name for name in self._foreign if find_name(name) is None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        self._load()
        return find_name(name) is not None or name in self._foreign

    def _get(self, name: str) -> object:
        self._load()
        values: SettingDict = self._values
        if name in values and name not in _OF_ENVIRONMENT:
            return values[name]
        setting_name = find_name(name)
        if setting_name is None:
            try:
                return self._foreign[name]
            except KeyError:
                return self._of_celery(name)
        if setting_name in _OF_ENVIRONMENT and (value := os.environ.get(_OF_ENVIRONMENT[setting_name])):
            return value
        if setting_name in values:
            return values[setting_name]
        setting = _TABLE.get(setting_name)
        if setting is None:
            return None
        if isinstance(setting.default, (dict, list)):
            # A container of this object's own, so that conf.beat_schedule["x"] = … is kept and shared with nobody.
            return values.setdefault(setting_name, copy.copy(setting.default))
        return setting.default

    def update(self, *mappings: Any, **settings: object) -> None:
        """Set several, or take in a whole configuration such as Flask's `app.config`."""
        self._load(is_look=False)
        named: SettingDict = {}
        for name, value in (pair for mapping in mappings for pair in dict(mapping).items()):
            if name.isupper() and self.setting_meant_by(name, None) is None:
                self._foreign.keep(name, value)
            else:
                named[name] = value
        named.update(settings)
        for name in [*named]:
            setting_name = find_name(name)
            if setting_name is not None:
                self._set(setting_name, named.pop(name))
        self._set_foreign(named)
        self._changed()

    def is_set(self, name: str) -> bool:
        """Whether a value was given, by whatever spelling."""
        self._load()
        setting_name = find_name(name)
        return name in self._foreign if setting_name is None else setting_name in self._values

    def unknown_names(self) -> dict[str, str | None]:
        """The names that were given as settings and are none of ours, each with the one that may have been meant."""
        self._load()
        return {name: near_setting(self._foreign.bare(name)) for name in sorted(self._foreign.explicit)}

    @contextmanager
    def overridden(self, values: SettingValues) -> Iterator[None]:
        """Have these settings in the block; at its end all settings are what they were before it. For tests."""
        self._load()
        before, foreign = dict(self._values), dict(self._foreign.explicit)
        try:
            for name, value in values.items():
                self[name] = value
            yield
        finally:
            self._values.clear()
            self._values.update(before)
            self._foreign.explicit = foreign
            self._changed()

    # -- reading configurations

    def later(self, read: Callable[[], None]) -> None:
        """Have `read` called before the first setting is looked at."""
        self._pending.append(read)

    def _load(self, *, is_look: bool = True) -> None:
        pending = self._pending
        if pending:
            before, self.__dict__["_is_looked_at"] = self._is_looked_at, True
            while pending:
                pending.pop(0)()
            self.__dict__["_is_looked_at"] = before
        if is_look:
            self.__dict__["_is_looked_at"] = True

    def _changed(self) -> None:
        if self.on_change is not None:
            self.on_change()

    def begin_with(self, values: SettingValues) -> None:
        """Set what an application is made with; None says nothing."""
        for name, value in values.items():
            if value is None:
                continue
            setting_name = find_name(name)
            if setting_name is None:
                self._set_foreign({name: value})
            else:
                self._set(setting_name, value)

    def configure(self, source: object, *, namespace: str | None = None) -> None:
        """Take the settings of a configuration (see `config_from_object`) in place of those of the one before."""
        if isinstance(source, str):
            source = _import(source)
        for kept in (self._values, self._foreign.explicit):
            for name in [name for name, value in self._read.items() if kept.get(name, _MISSING) is value]:
                del kept[name]
        self._foreign.forget_sources()
        before = {**self._values, **self._foreign.explicit}
        self.read_object(source, namespace=namespace)
        self.__dict__["_read"] = {
            name: value
            for kept in (self._values, self._foreign.explicit)
            for name, value in kept.items()
            if before.get(name, _MISSING) is not value
        }
        self._values.update(self._own)
        self._changed()

    def read_object(self, source: object, *, namespace: str | None = None) -> None:
        """Take the settings of a module, object, class or mapping; see `config_from_object`."""
        if isinstance(source, str):
            source = _import(source)
        follow_django(source, self, namespace)
        self._foreign.add_source(source, namespace)
        foreign = {}
        for name in _names(source):
            setting_name = self.setting_meant_by(name, namespace)
            if setting_name is not None:
                # Only now: Django's settings refuse to give some that are not set (SECRET_KEY).
                value = source[name] if isinstance(source, Mapping) else getattr(source, name)
                if find_name(setting_name) is None:
                    foreign[name] = value
                else:
                    self._set(setting_name, value)
        self._set_foreign(foreign)
        self._changed()

    def setting_meant_by(self, name: str, namespace: str | None) -> str | None:
        """The setting that an entry of a configuration means; None for entries that are not for us."""
        if namespace:
            prefix = f"{namespace.rstrip('_')}_"
            if not name.startswith(prefix):
                # The old names carry the prefix in their own way: CELERYD_CONCURRENCY, CELERYBEAT_SCHEDULE.
                return _OLD.get(name) if namespace.upper() == "CELERY" and name.startswith("CELERY") else None
            return find_name(name[len(prefix) :]) or find_name(name) or name
        setting_name = find_name(name)
        if setting_name is None and name.lower().startswith(_PREFIXES) and (name.islower() or name.isupper()):
            return name
        return setting_name

    # -- for people

    def table(self, with_defaults: bool = False, censored: bool = True) -> SettingDict:
        """The settings that were given (or all); secrets are masked unless `censored` is false."""
        self._load()
        names = [*(_TABLE if with_defaults else self._values), *self._foreign.explicit]
        return {name: masked(name, self._get(name)) if censored else self._get(name) for name in sorted(names)}

    def humanize(self, with_defaults: bool = False, censored: bool = True) -> str:
        """The settings that were given, a line for each; with stars for secrets unless `censored` is false."""
        settings = self.table(with_defaults, censored)
        return "\n".join(f"{name}: {value!r}" for name, value in settings.items())

    def __repr__(self) -> str:
        return f"<Settings {self.table()}>"


def _import(path: str) -> object:
    """`module` or `module:attribute` or `package.module.attribute`."""
    module, _, attribute = path.partition(":")
    try:
        source: object = load(module)
    except (ModuleNotFoundError, ValueError, TypeError) as error:  # the last two: what is no module's name
        parent, _, last = module.rpartition(".")
        if not parent or attribute or not isinstance(error, ModuleNotFoundError) or error.name != module:
            raise ConfigurationError(f"the configuration module {path!r} cannot be imported: {error}") from error
        source, attribute = load(parent), last
    for part in filter(None, attribute.split(".")):
        if not hasattr(source, part):
            raise ConfigurationError(f"{module!r} has no attribute {attribute!r} to take the configuration from")
        source = getattr(source, part)
    return source


def follow_django(source: object, conf: Settings, namespace: str | None) -> None:
    """Have changes of Django's settings (`override_settings` in tests) take effect in `conf`, too."""
    django = sys.modules.get("django.conf")
    if django is not None and source is django.settings:
        plugins().follow_django_settings(conf, namespace)


def _names(source: object) -> Iterator[str]:
    if isinstance(source, Mapping):
        yield from source
        return
    for name in dir(source):  # Django's settings object answers dir() with its settings
        if not name.startswith("_"):
            yield name


def _coerce(setting: Setting, value: object) -> object:
    """The value in the setting's kind. Raises: WrongValue naming setting, kind and value."""
    if value is None or setting.kind == "any":
        return value
    kind = KINDS[setting.kind]
    if is_secret(setting.name):  # or the error would show it
        try:
            return kind.convert(value)
        except WrongValue:
            raise  # it says what is wrong, and does not show the value
        except (ValueError, TypeError):
            raise WrongValue(f"setting {setting.name} wants {kind.wants}, not {described(value)}") from None
    return convert(f"setting {setting.name}", kind, value)


def _named(find: Callable[[str], str]) -> Callable[[Any], str]:
    """A kind's conversion for names that the serialization knows (or content types)."""

    def known(value: object) -> str:
        if not isinstance(value, str):
            raise TypeError
        try:
            find(value)
        except ConfigurationError as error:
            raise ValueError from error
        return value

    return known


# What the kinds of settings may be; see the table.
KINDS: dict[str, Kind] = {
    "str": option_types.TEXT,
    "int": option_types.COUNT,
    "float": option_types.SECONDS,
    "bool": option_types.BOOLEAN,
    "list": option_types.TEXTS,
    "dict": option_types.MAPPING,
    "transport_options": option_types.with_options(
        "a dictionary",
        {
            "retry_for": option_types.SECONDS,
            "polling_interval": option_types.PAUSE,
            "socket_timeout": option_types.PAUSE,
            "socket_connect_timeout": option_types.PAUSE,
            "health_check_interval": option_types.SECONDS,
            "max_connections": option_types.COUNT,
            "unread_results": option_types.COUNT,
        },
    ),
    "any": option_types.ANY,
    "name": option_types.NAME,
    "key": option_types.KEY,
    "pause": option_types.PAUSE,
    "broker_seconds": option_types.BROKER_SECONDS,
    "heartbeat": option_types.HEARTBEAT,
    "port": option_types.PORT,
    "positive": option_types.POSITIVE,
    "attempts": option_types.ATTEMPTS,
    "priority": option_types.PRIORITY,
    "delivery_mode": option_types.DELIVERY_MODE,
    "queue_type": option_types.QUEUE_TYPE,
    "flow_on_error": option_types.choice("wait", "run"),
    "history_type": option_types.choice("stream", "quorum"),
    "rate": option_types.RATE,
    "level": option_types.LEVEL,
    "log_format": option_types.LOG_FORMAT,
    "slots": option_types.either(
        "a whole number from 0 on, or 'auto'", option_types.COUNT, option_types.choice("auto")
    ),
    "prefetch": option_types.either(
        "'auto', or a whole number from 0 to 65535",
        option_types.choice("auto"),
        option_types.number("", 0, 65535, integer_only=True),
    ),
    "shards": option_types.number("a whole number from 1 to 1024", 1, 1024, integer_only=True),
    "queue_slots": Kind(f"a dictionary of queues and {WANTED}", slots_by_queue),
    "serializer": Kind(f"one of {', '.join(SERIALIZERS)}", _named(content_type)),
    "serializers": Kind("a list of serializers or content types", option_types.LIST.convert),
    "path": Kind("the path of a file or folder", os.fsdecode),
    "encryption_keys": Kind("a mapping of key ids to keys in base64", read_keys),
    "compression": Kind(f"one of {', '.join(COMPRESSIONS)}", _named(compression_type)),
    "queues": option_types.instance("a list of Queue, or a dictionary", Mapping, list, tuple, set, frozenset),
    "routes": option_types.either(
        "a dictionary, a list of routes, a function, or the path of one",
        Mapping,
        list,
        tuple,
        str,
        option_types.FUNCTION,
    ),
    "annotations": option_types.instance("a dictionary, or a list of them", Mapping, list, tuple),
    "urls": option_types.URLS,
    "tls": option_types.either(
        "True, or a dictionary (ca_certs, certfile, keyfile, cert_reqs)", Mapping, option_types.BOOLEAN
    ),
}
