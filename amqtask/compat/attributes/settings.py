"""`app.conf`: what Celery's configuration can be asked besides values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from amqtask.settings import Settings
from amqtask.settings.table import SETTINGS

if TYPE_CHECKING:
    from amqtask.ground.shapes import SettingValues


class Option:
    """Where a setting belongs: `namespace`, `key`, and its default."""

    def __init__(self, namespace: str, key: str, default: Any) -> None:
        self.namespace = namespace
        self.key = key
        self.default = default


def _is_set(conf: Settings, name: str) -> bool:
    return name in conf and conf[name] is not None


class OfSettings(Settings):
    """Bound to `app.conf`."""

    def first(self, *keys: str) -> Any:
        """The first of these settings that has a value."""
        return next((self[key] for key in keys if _is_set(self, key)), None)

    def get_by_parts(self, *parts: str) -> Any:
        """`get_by_parts("task", "default", "queue")`."""
        return self["_".join(part for part in parts if part)]

    def find_option(self, name: str, namespace: str = "") -> Option:
        """The setting of that name, in the namespace or any other. Raises: KeyError."""
        by_name = {setting.name: setting for setting in SETTINGS}
        full_name = f"{namespace}_{name}" if namespace else name
        match = by_name.get(full_name) or next((by_name[key] for key in by_name if key.endswith(f"_{name}")), None)
        if match is None:
            raise KeyError(name)
        space, _, key = match.name.partition("_")
        return Option(space, key, match.default)

    def find_value_for_key(self, name: str, namespace: str = "celery") -> Any:
        """The value of the setting that ends so: `find_value_for_key("default_queue", "task")`."""
        if namespace and f"{namespace}_{name}" in self:
            return self[f"{namespace}_{name}"]
        if name in self:
            return self[name]
        option = OfSettings.find_option(self, name)
        return self[f"{option.namespace}_{option.key}"]

    def value_set_for(self, key: str) -> bool:
        """Whether the setting has been set."""
        return self.is_set(key)

    def without_defaults(self) -> dict[str, Any]:
        """The settings that have been set."""
        return {name: self[name] for name in self if self.is_set(name)}

    def add_defaults(self, fun: Any) -> None:
        """Values (or a function that returns them) for what is not set."""
        values: SettingValues = fun() if callable(fun) else fun
        for name, value in values.items():
            if not self.is_set(name):
                self[name] = value

    @property
    def changes(self) -> dict[str, Any]:
        """The settings that have been set."""
        return OfSettings.without_defaults(self)

    @property
    def defaults(self) -> list[dict[str, Any]]:
        """The values of what is not set."""
        return [{setting.name: setting.default for setting in SETTINGS}]
