"""Names in a configuration that are no settings of ours (of libraries, of the application): kept as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

_MISSING = object()


class Others(MutableMapping[str, Any]):
    """Found under the name that they were given, in capitals, or with the namespace in front: `conf.once_timeout` is
    `CELERY_ONCE_TIMEOUT`. A configuration is asked when a name is looked for: Django refuses to tell some that are not set.
    """

    def __init__(self) -> None:
        # Set one by one, or in a namespace of ours.
        self.told: dict[str, Any] = {}
        self._kept: dict[str, Any] = {}
        self._sources: list[Any] = [self.told, self._kept]
        self._prefixes: list[str] = []

    def add_source(self, source: Any, namespace: str | None) -> None:
        """A module, object or mapping that was read; the last one counts first."""
        self._sources.insert(2, source)
        if namespace and f"{namespace.rstrip('_')}_" not in self._prefixes:
            self._prefixes.insert(0, f"{namespace.rstrip('_')}_")

    def keep(self, name: str, value: Any) -> None:
        """Of a configuration that belongs to others."""
        self._kept[name] = value

    def bare(self, name: str) -> str:
        """The name in small letters, without a namespace of ours."""
        prefix = next((prefix for prefix in self._prefixes if name.startswith(prefix)), "")
        return name[len(prefix) :].lower()

    def _spellings(self, name: str) -> Iterator[str]:
        yield name
        yield from (f"{prefix}{name.upper()}" for prefix in self._prefixes)
        yield from (name.upper(), name.lower(), self.bare(name))

    def __getitem__(self, name: str) -> Any:
        for spelling in self._spellings(name):
            for source in self._sources:
                found = source.get(spelling, _MISSING) if isinstance(source, Mapping) else _attribute(source, spelling)
                if found is not _MISSING:
                    return found
        raise KeyError(name)

    def __setitem__(self, name: str, value: Any) -> None:
        self.told[name] = value

    def __delitem__(self, name: str) -> None:
        del self.told[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.told)

    def __len__(self) -> int:
        return len(self.told)

    def replace(self, values: Mapping[str, Any]) -> None:
        """Have these set, and no more."""
        self.told.clear()
        self.told.update(values)


def _attribute(source: Any, name: str) -> Any:
    return _MISSING if name.startswith("_") else getattr(source, name, _MISSING)
