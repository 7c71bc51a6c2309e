"""Compositions of every kind with the values they must give: for result stores that count chords, and for whoever runs tasks.

`define(app)` registers the tasks; `COMPOSITIONS` and `ERRORS` build signatures of a `Tasks(app)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from amqtask.canvas import chain, chord, group

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.task import RegisteredTask

Build = Callable[[Any], Any]


def define(app: AmqTask) -> AmqTask:
    """Register the tasks that the compositions are made of."""

    @app.task(name="add")
    def add(x: int, y: int) -> int:
        return x + y

    @app.task(name="double")
    def double(x: int) -> int:
        return 2 * x

    @app.task(name="total")
    def total(numbers: Any) -> int:
        return sum(total(number) if isinstance(number, (list, tuple)) else number for number in numbers)

    @app.task(name="same")
    def same(value: object = "nothing") -> object:
        return value

    @app.task(name="fail")
    def fail(*args: object) -> None:
        raise ValueError("as told")

    @app.task(name="replaced", bind=True)
    def replaced(self: RegisteredTask, x: int) -> object:
        return self.replace(add.s(x, 100))

    @app.task(name="replaced_by_group", bind=True)
    def replaced_by_group(self: RegisteredTask, x: int) -> object:
        return self.replace(group(add.s(x, n) for n in range(3)))

    @app.task(name="replaced_by_chain", bind=True)
    def replaced_by_chain(self: RegisteredTask, x: int) -> object:
        return self.replace(add.s(x, 1) | group(double.s(), double.s()) | total.s())

    @app.task(name="flaky", bind=True, default_retry_delay=0)
    def flaky(self: RegisteredTask, x: int) -> int:
        if not self.request.retries:
            raise self.retry()
        return x

    @app.task(name="adds_one", bind=True)
    def adds_one(self: RegisteredTask, x: int) -> int:
        self.add_to_chord(same.s(x + 1))
        return x

    @app.task(name="adds_a_chord", bind=True)
    def adds_a_chord(self: RegisteredTask, x: int) -> int:
        self.add_to_chord(group(add.s(x, 1), add.s(x, 2)) | total.s())
        return x

    @app.task(name="adds_chains", bind=True)
    def adds_chains(self: RegisteredTask, x: int) -> int:
        for _ in range(2):
            self.add_to_chord(add.s(x, 1) | double.s())
        return x

    return app


class Tasks:
    """The app's tasks by name."""

    def __init__(self, app: AmqTask) -> None:
        app.finalize()
        self.app = app

    def __getattr__(self, name: str) -> Any:
        return self.app.tasks[name]


# What is composed, and the value of its result.
COMPOSITIONS: dict[str, tuple[Build, Any]] = {
    "chain": (lambda t: t.add.s(1, 2) | t.add.s(3) | t.double.s(), 12),
    "chain of a list": (lambda t: chain([t.add.s(1, 2), t.add.s(3)]), 6),
    "chain of chains": (lambda t: chain(t.add.s(1, 1) | t.double.s(), t.double.s() | t.add.s(1)), 9),
    "immutable step": (lambda t: t.add.s(1, 2) | t.add.si(10, 10), 20),
    "group": (lambda t: group(t.add.s(n, n) for n in range(4)), [0, 2, 4, 6]),
    "group of groups": (lambda t: group(t.add.s(1, 1), group(t.add.s(2, 2), t.add.s(3, 3))), [2, 4, 6]),
    "group of chains": (lambda t: group(t.add.s(1, 1) | t.double.s(), t.add.s(2, 2) | t.double.s()), [4, 8]),
    "empty group": (lambda t: group(), []),
    "group in a group through a chain": (
        lambda t: group(t.add.s(1, 1) | group(t.double.s(), t.add.s(5)), t.same.s(1)),
        [[4, 7], 1],
    ),
    "chord": (lambda t: chord([t.add.s(1, 1), t.add.s(2, 2)], t.total.s()), 6),
    "chord of one": (lambda t: chord([t.add.s(1, 1)], t.total.s()), 2),
    "chord of none": (lambda t: chord([], t.total.s()), 0),
    "chord keeps the order": (lambda t: chord([t.same.s(n) for n in range(20)], t.same.s()), list(range(20))),
    "immutable body": (lambda t: chord([t.add.s(1, 1)], t.add.si(7, 7)), 14),
    "group and a task": (lambda t: group(t.add.s(1, 1), t.add.s(2, 2)) | t.total.s(), 6),
    "group and a group": (
        lambda t: group(t.add.s(1, 1), t.add.s(2, 2)) | group(t.total.s(), t.same.s()),
        [6, [2, 4]],
    ),
    "chain with a group in the middle": (
        lambda t: t.add.s(1, 1) | group(t.add.s(1), t.add.s(2)) | t.total.s() | t.double.s(),
        14,
    ),
    "chain that ends in a group": (lambda t: t.add.s(1, 1) | group(t.add.s(1), t.add.s(2)), [3, 4]),
    "chain with two groups": (
        lambda t: group(t.add.s(1, 1), t.add.s(2, 2)) | t.total.s() | group(t.add.s(1), t.add.s(2)) | t.total.s(),
        15,
    ),
    "two groups in a row": (
        lambda t: t.same.s(1) | group(t.add.s(1), t.add.s(2)) | group(t.total.s(), t.total.s()) | t.total.s(),
        10,
    ),
    "chord with a chain as body": (
        lambda t: chord([t.add.s(1, 1), t.add.s(2, 2)], t.total.s() | t.double.s() | t.add.s(1)),
        13,
    ),
    "chord with a group as body": (
        lambda t: chord([t.same.s(1), t.same.s(2)], group(t.total.s(), t.same.s())),
        [3, [1, 2]],
    ),
    "chord in a chain": (
        lambda t: t.add.s(1, 1) | chord([t.add.s(1), t.add.s(2)], t.total.s()) | t.double.s(),
        14,
    ),
    "chord in a chord": (
        lambda t: chord([chord([t.same.s(1), t.same.s(2)], t.total.s()), t.same.s(10)], t.total.s()),
        13,
    ),
    "chord as body": (
        lambda t: chord([t.same.s(1), t.same.s(2)], chord([t.total.s(), t.total.s()], t.total.s())),
        6,
    ),
    "chains in a chord": (
        lambda t: chord([t.add.s(1, 1) | t.double.s(), t.add.s(2, 2) | t.double.s() | t.double.s()], t.same.s()),
        [4, 16],
    ),
    "groups in a chord": (lambda t: chord([group(t.same.s(1), t.same.s(2)), t.same.s(3)], t.same.s()), [1, 2, 3]),
    "group at the end of a chain in a chord": (
        lambda t: chord([t.same.s(1) | group(t.add.s(1), t.add.s(2)), t.same.s(9)], t.same.s()),
        [[2, 3], 9],
    ),
    "chord with a group as body, in a chord": (
        lambda t: chord([chord([t.same.s(1)], group(t.total.s(), t.total.s())), t.same.s(9)], t.same.s()),
        [[1, 1], 9],
    ),
    "deep": (
        lambda t: (
            group(
                group(t.same.s(1), t.same.s(2)) | t.total.s(), t.same.s(3) | group(t.add.s(1), t.add.s(2)) | t.total.s()
            )
            | t.total.s()
            | group(t.double.s(), t.double.s())
            | t.total.s()
        ),
        48,
    ),
    "map": (lambda t: t.double.map([1, 2, 3]), [2, 4, 6]),
    "starmap": (lambda t: t.add.starmap([(1, 1), (2, 2)]), [2, 4]),
    "chunks": (lambda t: t.add.chunks(zip(range(5), range(5), strict=True), 2), [[0, 2], [4, 6], [8]]),
    "map in a chain": (lambda t: t.double.map([1, 2]) | t.total.s(), 6),
    "chunks as a group": (lambda t: t.add.chunks([(1, 1), (2, 2), (3, 3)], 2).group() | t.total.s(), 12),
    "replaced": (lambda t: t.replaced.s(1) | t.double.s(), 202),
    "replaced by a group": (lambda t: t.replaced_by_group.s(1) | t.total.s(), 6),
    "replaced by a chain with a chord": (lambda t: t.replaced_by_chain.s(1) | t.add.s(1), 9),
    "retried in a chain": (lambda t: t.flaky.s(1) | t.flaky.s() | t.add.s(1), 2),
    "retried in a chord": (lambda t: chord([t.flaky.s(1), t.same.s(2)], t.total.s() | t.flaky.s()), 3),
    "added to its chord": (lambda t: chord([t.adds_one.s(1), t.same.s(10)], t.total.s()), 13),
    "a chord added to its chord": (lambda t: chord([t.adds_a_chord.s(1), t.same.s(10)], t.total.s()), 16),
    "chains added to their chord": (lambda t: chord([t.adds_chains.s(1), t.same.s(10)], t.total.s()), 19),
    "replaced in a chord": (
        lambda t: chord([t.replaced.s(1), t.replaced_by_group.s(1), t.same.s(5)], t.same.s()),
        [101, [1, 2, 3], 5],
    ),
}


ERRORS: dict[str, tuple[Build, type[Exception]]] = {
    "first step of a chain": (lambda t: t.fail.s() | t.double.s() | t.double.s(), ValueError),
    "middle step of a chain": (lambda t: t.same.s(1) | t.fail.s() | t.double.s(), ValueError),
    "member of a group": (lambda t: group(t.same.s(1), t.fail.s()), ValueError),
    "member of a chord": (lambda t: chord([t.same.s(1), t.fail.s()], t.total.s()), ValueError),
    "member of a chord with a chain as body": (lambda t: chord([t.fail.s()], t.total.s() | t.double.s()), ValueError),
    "body of a chord": (lambda t: chord([t.same.s(1)], t.fail.s()), ValueError),
    "chain in a chord": (
        lambda t: chord([t.fail.s() | t.double.s() | t.double.s(), t.same.s(1)], t.total.s()),
        ValueError,
    ),
    "chord in a chord": (lambda t: chord([chord([t.fail.s()], t.total.s()), t.same.s(1)], t.total.s()), ValueError),
    "before a chord": (lambda t: t.fail.s() | group(t.double.s(), t.double.s()) | t.total.s(), ValueError),
    "after a chord": (lambda t: group(t.same.s(1)) | t.fail.s() | t.double.s(), ValueError),
}
