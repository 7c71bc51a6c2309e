"""Stamps: headers that a caller puts on every task of a composition, to find, count or revoke them by (Celery's canvas stamping).

`sig.stamp(customer="7")` stamps all tasks of a signature alike; `sig.stamp(visitor)` asks a StampingVisitor for each part. What
is handed down from a part's surroundings wins over what the visitor says, and both over what the part was stamped with
before; with `append_stamps` all of them are kept, as a list.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

NAMES = "stamped_headers"


class StampingVisitor(ABC):
    """What to stamp on the parts of a composition. Each method returns stamps by name; with the key `stamped_headers` only the
    names listed there are stamps."""

    @abstractmethod
    def on_signature(self, sig: Any, **headers: Any) -> dict[str, Any]:
        """For each task."""

    def on_group_start(self, group: Any, **headers: Any) -> dict[str, Any]:
        """For all members of a group."""
        return {}

    def on_group_end(self, group: Any, **headers: Any) -> None:  # noqa: B027 - a hook
        """Its members are stamped."""

    def on_chain_start(self, chain: Any, **headers: Any) -> dict[str, Any]:
        """For all steps of a chain."""
        return {}

    def on_chain_end(self, chain: Any, **headers: Any) -> None:  # noqa: B027 - a hook
        """Its steps are stamped."""

    def on_chord_header_start(self, chord: Any, **headers: Any) -> dict[str, Any]:
        """For all members of a chord's header; as for a group unless it is overridden."""
        return self.on_group_start(chord, **headers)

    def on_chord_header_end(self, chord: Any, **headers: Any) -> None:
        """Its header is stamped."""
        self.on_group_end(chord, **headers)

    def on_chord_body(self, chord: Any, **headers: Any) -> dict[str, Any]:
        """For a chord's body."""
        return {}

    def on_callback(self, callback: Any, **headers: Any) -> dict[str, Any]:
        """For a callback (`link`)."""
        return {}

    def on_errback(self, errback: Any, **headers: Any) -> dict[str, Any]:
        """For an errback (`link_error`)."""
        return {}


def gathered(
    handed_down: Mapping[str, Any],
    visited: Mapping[str, Any] | None,
    own: Mapping[str, Any],
    *,
    append: bool,
) -> dict[str, Any]:
    """The stamps of one part, with their names under `stamped_headers`. `own` are its options."""
    found = _named(handed_down)
    if visited:
        _add(found, _named(visited), append)
    if own.get(NAMES):
        names = list(own[NAMES])
        _add(found, {NAMES: names, **{name: own[name] for name in names if name in own}}, append)
    found[NAMES] = list(dict.fromkeys(found[NAMES]))
    return found


def _named(stamps: Mapping[str, Any]) -> dict[str, Any]:
    names = list(stamps[NAMES]) if NAMES in stamps else list(stamps)
    return {**stamps, NAMES: names}


def _add(found: dict[str, Any], more: Mapping[str, Any], append: bool) -> None:
    for name, value in more.items():
        known = found.get(name)
        if name not in found:
            found[name] = value
        elif isinstance(known, list) and isinstance(value, list):
            found[name] = [*known, *value]
        elif append:
            found[name] = [*(known if isinstance(known, (list, tuple)) else [known]), value]
