"""A directed graph, in the order in which it can be worked off, and in Graphviz's language."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any, TextIO


class DependencyGraph:
    """Nodes and, for each, those that it led to (Celery's DependencyGraph, as far as results use it)."""

    def __init__(self) -> None:
        self.adjacent: dict[Hashable, list[Hashable]] = {}

    def add_arc(self, node: Hashable) -> None:
        """A node."""
        self.adjacent.setdefault(node, [])

    def add_edge(self, node: Hashable, following: Hashable) -> None:
        """`node` led to `following`."""
        self.add_arc(node)
        self.add_arc(following)
        self.adjacent[node].append(following)

    def topsort(self) -> list[Any]:
        """The nodes, each after all that it led to."""
        ordered: dict[Hashable, None] = {}

        def visit(node: Hashable) -> None:
            for following in self.adjacent[node]:
                if following not in ordered:
                    visit(following)
            ordered[node] = None

        for node in self.adjacent:
            if node not in ordered:
                visit(node)
        return list(ordered)

    def to_dot(self, file: TextIO | None = None) -> str:
        """The graph in Graphviz's language; written to `file` too, if one is given."""
        lines = ["digraph dependencies {"]
        lines += [f'    "{node}";' for node in self.adjacent]
        lines += [f'    "{node}" -> "{following}";' for node, targets in self.adjacent.items() for following in targets]
        text = "\n".join([*lines, "}", ""])
        if file is not None:
            file.write(text)
        return text

    def __iter__(self) -> Iterator[Any]:
        return iter(self.adjacent)

    def __len__(self) -> int:
        return len(self.adjacent)

    def __contains__(self, node: object) -> bool:
        return node in self.adjacent


def before(result: Any) -> Iterator[Any]:
    """The parents of a result, the nearest first; each once, though somebody may have made a circle of them."""
    seen, node = {id(result)}, result.parent
    while node is not None and id(node) not in seen:
        seen.add(id(node))
        yield node
        node = node.parent


def tuple_of(result: Any) -> Any:
    """`((id, parent), members)`, as Celery writes it; each parent once, as in `before`."""
    encoded: Any = None
    for node in reversed([result, *before(result)]):
        members = getattr(node, "results", None)
        encoded = (node.id, encoded), None if members is None else [member.as_tuple() for member in members]
    return encoded
