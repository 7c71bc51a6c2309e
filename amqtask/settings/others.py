"""Names in a configuration that are no settings of ours (of libraries, of the application): kept as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amqtask.ground.shapes import SettingDict, SettingValues

_MISSING = object()


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

    def replace(self, values: SettingValues) -> None:
        """Replace the names that were set one by one by these."""
        self.explicit.clear()
        self.explicit.update(values)

    def clear(self) -> None:
        """Forget all names and sources."""
        for names in (self.explicit, self._kept, self._sources):
            names.clear()


def _attribute(source: object, name: str) -> object:
    return _MISSING if name.startswith("_") else getattr(source, name, _MISSING)
