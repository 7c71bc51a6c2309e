"""A graph of results: who published whom (Celery's DependencyGraph, as far as results use it)."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator
from typing import Any, TextIO


class DependencyGraph:
    """Nodes and, for each, what it led to."""

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


class WithDescendants:
    """A result that knows what its task led to."""

    def iterdeps(self, timeout: float | None = None, **_: object) -> Iterator[tuple[Any, Any]]:
        """This result and those of what its task published, and so on, as (publisher's result, result); each is waited
        for before its children are known."""
        waiting: deque[tuple[Any, Any]] = deque([(None, self)])
        while waiting:
            parent, result = waiting.popleft()
            yield parent, result
            result.get(timeout)
            waiting.extend((result, child) for child in result.children or ())

    def collect(self, timeout: float | None = None, **_: object) -> Iterator[tuple[Any, Any]]:
        """This result and those of what its task published, and so on, as (result, value)."""
        for _parent, result in self.iterdeps(timeout):
            yield result, result.get(timeout)

    @property
    def graph(self) -> DependencyGraph:
        """The graph of this result and of the tasks that it led to, each waited for."""
        return self.build_graph()

    def build_graph(self, timeout: float | None = None, **_: object) -> DependencyGraph:
        """The graph of results, with `timeout` seconds for each."""
        graph = DependencyGraph()
        for parent, result in self.iterdeps(timeout):
            if parent is None:
                graph.add_arc(result)
            else:
                graph.add_edge(parent, result)
        return graph

    def get_leaf(self, timeout: float | None = None) -> Any:
        """The value of the last result of `collect`."""
        return [value for _, value in self.collect(timeout)][-1]
