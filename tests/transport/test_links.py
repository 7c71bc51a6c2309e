"""Links: which call has which connection."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

from amqtask.transport.link import Link, Links


class CallsWhenCleared:
    """Calls a function when the frame whose variable it is has been cleared."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function

    def __del__(self) -> None:
        self._function()


def test_a_link_that_changes_hands_while_ended_calls_are_sought_stays_with_its_call() -> None:
    links: Links[Link] = Links(3, lambda: Link(heartbeat=None, name=""))
    here = sys._getframe()
    for link in [links.take(here, 0.0), links.take(here, 0.0)]:
        assert link is not None
        links.give_back(link)
    has_taken, may_end = threading.Event(), threading.Event()
    taken: list[Link | None] = []

    def another_call() -> None:
        link = links.take_free(sys._getframe())
        assert link is not None
        has_taken.set()
        may_end.wait(60)
        links.give_back(link)

    def change_hands() -> None:
        may_end.set()
        other.join()
        taken.append(links.take_free(here))

    def call_that_gives_nothing_back() -> None:
        _ = CallsWhenCleared(change_hands)
        links.take_free(sys._getframe())

    call_that_gives_nothing_back()
    other = threading.Thread(target=another_call)
    other.start()
    assert has_taken.wait(60)

    added = links.take(here, 0.0)

    assert len(taken) == 1
    assert len(links) == 2, "the link that changed hands was dropped under its call"
    assert None not in {added, *taken}
