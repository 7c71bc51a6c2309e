"""Stamps: headers that a caller puts on every task of a composition, to find, count or revoke them by (Celery's canvas stamping).

`sig.stamp(customer="7")` stamps all tasks of a signature alike; `sig.stamp(visitor)` calls a StampingVisitor for each part.
Stamps of the composition around a part win over those of the visitor, and both over the part's earlier stamps; with
`append_stamps` all of them are kept, as a list.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amqtask.ground.shapes import Options, StampDict, Stamps

NAMES = "stamped_headers"


class StampingVisitor(ABC):
    """Chooses the stamps for the parts of a composition. Each method returns stamps by name; with the key `stamped_headers` only
    the names listed there are stamps."""

    @abstractmethod
    def on_signature(self, sig: Any, **headers: object) -> StampDict:
        """For each task."""

    def on_group_start(self, group: Any, **headers: object) -> StampDict:
        """For all members of a group."""
        return {}

    def on_group_end(self, group: Any, **headers: object) -> None:  # noqa: B027 - a hook
        """Its members are stamped."""

    def on_chain_start(self, chain: Any, **headers: object) -> StampDict:
        """For all steps of a chain."""
        return {}

    def on_chain_end(self, chain: Any, **headers: object) -> None:  # noqa: B027 - a hook
        """Its steps are stamped."""

    def on_chord_header_start(self, chord: Any, **headers: object) -> StampDict:
        """For all members of a chord's header; as for a group unless it is overridden."""
        return self.on_group_start(chord, **headers)

    def on_chord_header_end(self, chord: Any, **headers: object) -> None:
        """Its header is stamped."""
        self.on_group_end(chord, **headers)

    def on_chord_body(self, chord: Any, **headers: object) -> StampDict:
        """For a chord's body."""
        return {}

    def on_callback(self, callback: Any, **headers: object) -> StampDict:
        """For a callback (`link`)."""
        return {}

    def on_errback(self, errback: Any, **headers: object) -> StampDict:
        """For an errback (`link_error`)."""
        return {}


def gathered(
    handed_down: Stamps,
    visited: Stamps | None,
    options: Options,
    *,
    append: bool,
) -> StampDict:
    """The stamps of one part, with their names under `stamped_headers`. `options` are its own."""
    stamps = _named(handed_down)
    if visited:
        _add(stamps, _named(visited), append)
    if options.get(NAMES):
        names = list(options[NAMES])
        _add(stamps, {NAMES: names, **{name: options[name] for name in names if name in options}}, append)
    stamps[NAMES] = list(dict.fromkeys(stamps[NAMES]))
    return stamps


def _named(stamps: Stamps) -> StampDict:
    names = list(stamps[NAMES]) if NAMES in stamps else list(stamps)
    return {**stamps, NAMES: names}


def _add(stamps: StampDict, added: Stamps, append: bool) -> None:
    for name, value in added.items():
        current = stamps.get(name)
        if name not in stamps:
            stamps[name] = value
        elif isinstance(current, list) and isinstance(value, list):
            stamps[name] = [*current, *value]
        elif append:
            stamps[name] = [*(current if isinstance(current, (list, tuple)) else [current]), value]
