"""The ledger: every finished delivery is acked once, in few frames, and never an open one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amqtask.worker.deliveries import Acks, Ledger


@pytest.mark.parametrize(
    ("received", "finished", "acks"),
    [
        (5, [], Acks(0, [])),
        (1, [1], Acks(0, [1])),
        (5, [1, 2, 3], Acks(3, [])),
        (5, [3, 1, 2], Acks(3, [])),
        (5, [5, 4, 3, 2, 1], Acks(5, [])),
        (5, [2, 3], Acks(0, [2, 3])),
        (5, [1, 3], Acks(0, [1, 3])),
        (5, [1, 2, 4, 5], Acks(2, [4, 5])),
    ],
)
def test_the_longest_finished_prefix_is_one_frame_and_the_rest_are_single(
    received: int, finished: list[int], acks: Acks
) -> None:
    ledger = Ledger()
    for tag in range(1, received + 1):
        ledger.add(tag)
    for tag in finished:
        ledger.finish(tag)

    assert ledger.flush() == acks


def test_tags_answered_otherwise_do_not_break_the_prefix() -> None:
    ledger = Ledger()
    for tag in range(1, 5):
        ledger.add(tag)
    ledger.drop(2)
    ledger.finish(1)
    ledger.finish(3)

    assert ledger.flush() == Acks(3, [])


def test_a_new_epoch_makes_everything_void() -> None:
    ledger = Ledger(epoch=1)
    ledger.add(1)
    ledger.finish(1)
    ledger.begin(2)

    assert ledger.flush() == Acks(0, [])
    assert ledger.outstanding == 0


class BrokerChannel:
    """What RabbitMQ does with acks: an unknown tag closes the channel."""

    def __init__(self) -> None:
        self.unanswered: set[int] = set()
        self.acked: set[int] = set()

    def ack(self, tag: int, *, multiple: bool) -> None:
        assert tag in self.unanswered, "PRECONDITION_FAILED - unknown delivery tag"
        tags = {other for other in self.unanswered if other <= tag} if multiple else {tag}
        self.unanswered -= tags
        self.acked |= tags


@given(st.lists(st.sampled_from(["deliver", "finish-oldest", "finish-newest", "finish-middle", "drop", "flush"])))
def test_whatever_happens_exactly_the_finished_are_acked_once(steps: list[str]) -> None:
    ledger, channel = Ledger(), BrokerChannel()
    next_tag, finished = 1, set[int]()

    def flush() -> None:
        acks = ledger.flush()
        if acks.upto:
            channel.ack(acks.upto, multiple=True)
        for tag in acks.singles:
            channel.ack(tag, multiple=False)
        assert channel.acked == finished
        assert channel.unanswered == set(ledger.open_tags)

    for step in steps:
        open_tags = ledger.open_tags
        if step == "deliver":
            ledger.add(next_tag)
            channel.unanswered.add(next_tag)
            next_tag += 1
        elif step == "flush":
            flush()
        elif open_tags and step == "drop":
            ledger.drop(open_tags[-1])
            channel.unanswered.discard(open_tags[-1])
        elif open_tags:
            position = {"finish-oldest": 0, "finish-newest": -1, "finish-middle": len(open_tags) // 2}[step]
            ledger.finish(open_tags[position])
            finished.add(open_tags[position])
    flush()
