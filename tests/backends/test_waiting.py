"""Which results a process keeps, and for how long."""

from __future__ import annotations

import gc

import pytest

from amqtask import states
from amqtask.backends.rpc import Arrivals, Mailbox
from amqtask.protocol.result import ResultMessage


class Holder:
    """Somebody who wants a result, as an AsyncResult does."""


def done(number: int) -> ResultMessage:
    return ResultMessage(f"task-{number}", states.SUCCESS, number)


def test_of_results_that_nobody_holds_the_oldest_unread_go_first() -> None:
    mailbox = Mailbox(capacity=3)

    for number in range(5):
        mailbox.put(done(number))

    assert [mailbox.is_ready(f"task-{number}") for number in range(5)] == [False, False, True, True, True]


def test_a_result_that_somebody_holds_stays_whatever_comes() -> None:
    mailbox = Mailbox(capacity=3)
    holders = [Holder() for _ in range(2)]
    for number, holder in enumerate(holders):
        mailbox.hold(f"task-{number}", holder)

    for number in range(5_000):
        mailbox.put(done(number))

    assert mailbox.is_ready("task-0")
    assert mailbox.is_ready("task-1")
    assert len(mailbox) == 5


def test_what_was_held_goes_when_its_holders_have_gone() -> None:
    mailbox = Mailbox(capacity=10)
    holders = []
    for number in range(3_000):
        holders.append(Holder())
        mailbox.hold(f"task-{number}", holders[-1])
        mailbox.put(done(number))
    assert len(mailbox) == 3_000

    holders.clear()
    gc.collect()
    for number in range(3_000, 20_000):
        holders.append(Holder())
        mailbox.hold(f"task-{number}", holders[-1])
        mailbox.put(done(number))

    assert not mailbox.is_ready("task-0")
    assert len(mailbox) == 17_000


def test_results_that_were_read_go_sooner_than_unread_ones() -> None:
    mailbox = Mailbox(capacity=100, recent=2)
    for number in range(10):
        mailbox.put(done(number))

    for number in range(5):
        assert mailbox.take(f"task-{number}") is not None

    assert [mailbox.is_ready(f"task-{number}") for number in range(6)] == [False, False, False, True, True, True]


@pytest.mark.parametrize(
    ("known", "new", "stays"),
    [
        (states.STARTED, states.RETRY, False),
        (states.STARTED, states.SUCCESS, False),
        (states.FAILURE, states.STARTED, True),
        (states.FAILURE, states.SUCCESS, False),
        (states.SUCCESS, states.FAILURE, True),
        (states.SUCCESS, states.STARTED, True),
    ],
)
def test_which_state_replaces_which(known: str, new: str, stays: bool) -> None:
    mailbox = Mailbox()
    mailbox.put(ResultMessage("it", known))

    mailbox.put(ResultMessage("it", new))

    found = mailbox.find("it")
    assert found is not None
    assert found.status == (known if stays else new)


def test_a_callback_that_was_taken_back_is_not_called() -> None:
    mailbox = Mailbox()
    called: list[ResultMessage] = []
    mailbox.when_ready("task-1", called.append)

    mailbox.cancel("task-1", called.append)
    mailbox.put(done(1))

    assert not called


def test_a_callback_may_ask_for_another_result() -> None:
    mailbox = Mailbox()
    called: list[str] = []
    mailbox.when_ready("task-1", lambda _: mailbox.when_ready("task-2", lambda result: called.append(result.task_id)))

    mailbox.put(done(2))
    mailbox.put(done(1))

    assert called == ["task-2"]


def test_arrivals_leave_nothing_behind_when_they_are_given_up() -> None:
    mailbox = Mailbox()
    mailbox.put(done(1))
    arrivals = Arrivals(mailbox, ["task-1", "task-2", "task-2", "task-3"])

    assert arrivals.next().task_id == "task-1"
    assert arrivals.missing == 2
    arrivals.close()
    mailbox.put(done(2))

    assert not arrivals
    assert arrivals.missing == 2
