"""One workflow as lines: tasks, groups, and what is still to come, each with what it waits for. Pure: tasks in, lines out.

Each line is below the one that it comes from. A group is where the ways to its members part; what gets its results comes after.
Events may tell anything, also circles: no line comes twice.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from datetime import datetime, timezone
from typing import TYPE_CHECKING, NamedTuple

from amqtask import states

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from amqtask.ground.shapes import JsonObject
    from amqtask.history.client import Following, PastTask

# Members of a group that are shown, those that are not through first.
MOST_MEMBERS = 50
ENDED = frozenset({*states.READY_STATES, states.REJECTED})
FAILED = frozenset({states.FAILURE, states.REVOKED, states.REJECTED})


class Node(NamedTuple):
    """A task, or a group."""

    kind: str
    id: str


class Workflow:
    """`lines()` of these tasks.

    A line that `is_next` comes after the one above it of the same depth; others stand beside those."""

    def __init__(self, tasks: Sequence[PastTask], now: datetime | None = None) -> None:
        self._now = now or datetime.now(timezone.utc)
        self._tasks = {task.id: task for task in tasks}
        self._members: dict[str, list[PastTask]] = defaultdict(list)
        self._bodies: dict[str, str] = {}
        for task in tasks:
            if task.group_id:
                self._members[task.group_id].append(task)
                for one in task.follows:
                    if one.how == "chord" and one.id in self._tasks:
                        self._bodies.setdefault(one.id, task.group_id)
        self._bodies.update((task.id, task.joins) for task in tasks if task.joins and task.joins in self._members)
        self._parents: dict[Node, Node | None] = {}
        for task in tasks:
            self._parents[Node("task", task.id)] = self._parent_of(task)
        placed: set[str] = set()
        for group in self._members:
            if group not in placed:
                self._place(group, placed)
        self._children: dict[Node | None, list[Node]] = defaultdict(list)
        for node, parent in self._parents.items():
            self._children[parent].append(node)

    def _parent_of(self, task: PastTask) -> Node | None:
        group = self._bodies.get(task.id)
        if group is not None:
            return Node("group", group)
        return Node("task", task.parent_id) if task.parent_id in self._tasks else None

    # -- where groups are

    def _place(self, group: str, placed: set[str]) -> None:
        """Put a group between its members, or what leads to them, and what they have in common; inner groups first."""
        waiting = [group]
        while waiting:
            current = waiting[-1]
            placed.add(current)
            paths = [self._path(Node("task", member.id)) for member in self._members[current]]
            inner = next(
                (node.id for path in paths for node in path if node.kind == "group" and node.id not in placed), None
            )
            if inner is not None:
                waiting.append(inner)
                continue
            waiting.pop()
            self._insert(Node("group", current), paths)

    def _insert(self, group: Node, paths: Sequence[Sequence[Node]]) -> None:
        # A group whose members come from its own body is none that can be drawn: its members stay where they are.
        common = set(paths[0][1:]).intersection(*(path[1:] for path in paths[1:]))
        anchor = next((node for node in paths[0][1:] if node in common and node != group), None)
        if any(group in path for path in paths):
            self._parents[group] = None
            return
        self._parents[group] = anchor
        for path in paths:
            top = path[path.index(anchor) - 1] if anchor is not None else path[-1]
            self._parents[top] = group

    def _path(self, node: Node) -> list[Node]:
        path: list[Node] = []
        current: Node | None = node
        while current is not None and current not in path:
            path.append(current)
            current = self._parents.get(current)
        return path

    # -- lines

    def lines(self) -> Iterator[JsonObject]:
        """Each line: `kind` (task, group, expected or hidden), `depth`, and what there is to say."""
        visited: set[Node] = set()
        tops = [*self._children[None], *self._parents]  # the rest is in circles
        for top in tops:
            yield from self._branch(top, visited)

    def _branch(self, top: Node, visited: set[Node]) -> Iterator[JsonObject]:
        stack: list[tuple[Node | JsonObject, int, bool]] = [(top, 0, False)]
        while stack:
            node, depth, is_next = stack.pop()
            if isinstance(node, Node):
                if node in visited:
                    continue
                visited.add(node)
            line = node if isinstance(node, dict) else self._line(node)
            yield {**line, "depth": depth, "is_next": is_next}
            if isinstance(node, Node):
                below = self._below_group(node, visited) if node.kind == "group" else self._below_task(node)
                stack += [(one, depth + further, not further) for one, further in reversed(below)]

    def _line(self, node: Node) -> JsonObject:
        return self._group_line(node.id) if node.kind == "group" else self._task_line(node.id)

    def _below_task(self, node: Node) -> list[tuple[Node | JsonObject, int]]:
        children = self._children[node]
        below: list[tuple[Node | JsonObject, int]] = [(child, 1 if len(children) > 1 else 0) for child in children]
        return [*below, *((line, 0) for line in self._expected_after(self._tasks[node.id]))]

    def _hide(self, nodes: Iterable[Node], visited: set[Node]) -> None:
        """Show neither these nor what is below them."""
        waiting = list(nodes)
        while waiting:
            node = waiting.pop()
            if node not in visited:
                visited.add(node)
                waiting += self._children[node]

    def _below_group(self, node: Node, visited: set[Node]) -> list[tuple[Node | JsonObject, int]]:
        bodies = [child for child in self._children[node] if self._bodies.get(child.id) == node.id]
        branches = [child for child in self._children[node] if child not in bodies]
        branches.sort(key=self._is_over)
        below: list[tuple[Node | JsonObject, int]] = [(branch, 1) for branch in branches[:MOST_MEMBERS]]
        if len(branches) > MOST_MEMBERS:
            self._hide(branches[MOST_MEMBERS:], visited)
            below.append(({"kind": "hidden", "count": len(branches) - MOST_MEMBERS}, 1))
        if bodies:
            return [*below, *((body, 0) for body in bodies)]
        return [*below, *((line, 0) for line in self._expected_body(node.id))]

    def _is_over(self, node: Node) -> bool:
        task = self._tasks.get(node.id) if node.kind == "task" else None
        return task is not None and task.state == states.SUCCESS

    def _task_line(self, task_id: str) -> JsonObject:
        task = self._tasks[task_id]
        return {
            "kind": "task",
            "id": task.id,
            "task": task.name,
            "state": task.state,
            "waits_for": waits_for(task, self._now),
            "error": task.exception if task.state in FAILED else None,
            "first": task.first,
            "ended": task.ended,
            "runtime": task.runtime,
            "worker": task.worker,
            "queue": task.queue,
            "group": task.group_id,
            "index": task.group_index,
        }

    def _group_line(self, group: str) -> JsonObject:
        members = self._members[group]
        size = next((one.size for task in members for one in task.follows if one.how == "chord" and one.size), None)
        is_chord = size is not None or group in self._bodies.values() or self._body_of(group) is not None
        return {
            "kind": "group",
            "id": group,
            "is_chord": is_chord,
            "count": len(members),
            "size": size,
            "states": dict(Counter(task.state for task in members).most_common()),
        }

    # -- what is to come

    def _exists(self, one: Following) -> bool:
        return one.id in self._tasks or one.id in self._members

    def _expected_after(self, task: PastTask) -> list[JsonObject]:
        """Next steps and callbacks; a later step that is there tells of those after it."""
        steps = [one for one in task.follows if one.how in ("chain", "then", "link", "")]
        if task.group_id in self._members:
            steps = [one for one in steps if one.how != "then"]
        if any(one.how == "chain" and self._exists(one) for one in steps):
            return []
        reason = task.name or task.id
        lines = []
        for one in steps:
            is_shown = task.state not in states.READY_STATES if one.how == "link" else not self._exists(one)
            if is_shown:
                lines.append(_expected(one, _after_one(task, reason)))
                reason = _name(one) or reason
        return lines

    def _body_of(self, group: str) -> Following | None:
        return next((one for task in self._members[group] for one in task.follows if one.how == "chord"), None)

    def _expected_body(self, group: str) -> list[JsonObject]:
        body = self._body_of(group)
        if body is None:
            return []
        members = self._members[group]
        size = body.size or len(members)
        failed = [task for task in members if task.state in FAILED]
        if failed:
            waits = f"does not come as long as {failed[0].name or failed[0].id} has not succeeded: {failed[0].state}"
        else:
            counts = Counter(task.state for task in members if task.state != states.SUCCESS)
            done = sum(task.state == states.SUCCESS for task in members)
            unfinished = ", ".join(f"{number} {state}" for state, number in counts.most_common())
            waits = f"waits for {size - done} of {size} members" + (f": {unfinished}" if unfinished else "")
        return [_expected(body, waits)]


def _expected(one: Following, waits: str) -> JsonObject:
    if one.task is None:
        return {"kind": "hidden", "count": one.more}
    return {
        "kind": "expected", "how": one.how, "task": _name(one), "id": one.id, "members": one.members, "waits_for": waits,
    }  # fmt: skip


def _name(one: Following) -> str | None:
    short = (one.task or "").removeprefix("celery.")
    return f"{short} of {one.members}" if short in ("group", "chord") and one.members else one.task


def _after_one(task: PastTask, after: str) -> str:
    if task.state in FAILED:
        return f"does not come as long as {task.name or task.id} has not succeeded: {task.state}"
    return f"waits for {after}"


def waits_for(task: PastTask, now: datetime) -> str | None:
    """What a task waits for; None for one that has ended."""
    if task.state in ENDED:
        return None
    if task.state == states.STARTED:
        return f"runs on {task.worker}"
    if task.eta and _is_later(task.eta, now):
        return f"waits until {task.eta}"
    if task.state == states.RETRY:
        return "waits for its next attempt"
    if task.state == states.RECEIVED:
        return f"waits for a slot of {task.worker}"
    return f"waits for a worker in {task.queue or 'its queue'}"


def _is_later(written: str, now: datetime) -> bool:
    try:
        moment = datetime.fromisoformat(written)
    except ValueError:
        return False
    return moment.tzinfo is not None and moment > now


def numbers(tasks: Iterable[PastTask]) -> dict[str, int]:
    """How many tasks have each state, the most first."""
    return dict(Counter(task.state for task in tasks).most_common())
