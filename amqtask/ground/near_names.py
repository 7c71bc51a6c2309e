"""What a name that does not exist may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Characters of a name that is compared with others.
LONGEST_COMPARED = 200


def near_names(name: str, names: Iterable[str], *, most: int = 1, alike: float = 0.6) -> list[str]:
    """Of all names those that are most like one that does not exist; none for a name of more than LONGEST_COMPARED characters."""
    return difflib.get_close_matches(name, list(names), most, alike) if len(name) <= LONGEST_COMPARED else []


def did_you_mean(name: str, names: Iterable[str], *, most: int = 1, alike: float = 0.6) -> str:
    """` Did you mean 'this'?` for the end of an error about a name that does not exist, or nothing."""
    near = near_names(name, names, most=most, alike=alike)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
