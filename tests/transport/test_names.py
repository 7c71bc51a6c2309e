from __future__ import annotations

import pytest

from amqtask import AmqTask, Exchange, Queue
from amqtask.assembly import build_worker
from amqtask.exceptions import ConfigurationError, PublishError
from amqtask.transport.declare import check_name
from amqtask.worker.options import WorkerOptions


@pytest.mark.parametrize("entity", [Queue, Exchange])
def test_a_name_that_no_queue_or_exchange_can_have_is_refused(entity: type[Queue] | type[Exchange]) -> None:
    check_name(entity("ä" * 127))
    with pytest.raises(PublishError, match="has 256 bytes, and can have 255"):
        check_name(entity("ä" * 128))
    with pytest.raises(PublishError, match="line end"):
        check_name(entity("two\nlines"))


@pytest.mark.parametrize(("name", "said"), [("w@" + 240 * "h", "242 bytes, and can have 241"), ("w@h\n", "a line end")])
def test_a_node_name_whose_mailbox_cannot_be_declared_is_refused(name: str, said: str) -> None:
    app = AmqTask("names", broker="memory://", set_as_current=False)

    build_worker(app, WorkerOptions(pool="solo", hostname="w@" + 239 * "h")).loop.close()
    with pytest.raises(ConfigurationError, match=said):
        build_worker(app, WorkerOptions(pool="solo", hostname=name))


@pytest.mark.parametrize(
    ("name", "said"),
    [("q" * 256, "has 256 bytes, and can have 255"), ("q" * 251, "has 256 bytes"), ("two\nlines", "line end")],
    ids=["long", "long with .dead", "lines"],
)
def test_a_worker_does_not_start_for_a_queue_that_cannot_be(name: str, said: str) -> None:
    app = AmqTask("names", broker="memory://", set_as_current=False)

    with pytest.raises(ConfigurationError, match=said):
        build_worker(app, WorkerOptions(pool="solo", queues=(name,)))
