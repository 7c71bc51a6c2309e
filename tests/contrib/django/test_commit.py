"""`delay_on_commit` and its kin: published with the commit, not before, and not after a rollback."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from amqtask import AmqTask

pytestmark = pytest.mark.usefixtures("committed")


@pytest.fixture
def shop() -> Any:
    app = AmqTask("shop", broker="memory://", task_default_queue="work", set_as_current=False)

    @app.task
    def confirm(number: int) -> None: ...

    def waiting() -> int:
        broker = app.memory_broker
        assert broker is not None
        return broker.count("work") if "work" in broker.queue_names() else 0

    app.waiting, app.confirm = waiting, confirm  # type: ignore[attr-defined]
    return app


def test_a_call_leaves_with_the_commit(shop: Any) -> None:
    from django.db import transaction

    with transaction.atomic():
        assert shop.confirm.delay_on_commit(1) is None
        shop.confirm.apply_async_on_commit((2,), countdown=0)
        assert shop.waiting() == 0

    assert shop.waiting() == 2


def test_a_call_of_a_transaction_that_is_rolled_back_never_leaves(shop: Any) -> None:
    from django.db import transaction

    with transaction.atomic():
        shop.confirm.delay_on_commit(1)
        transaction.set_rollback(True)

    assert shop.waiting() == 0


def test_without_a_transaction_a_call_leaves_at_once(shop: Any) -> None:
    shop.confirm.delay_on_commit(1)

    assert shop.waiting() == 1


def test_coroutines_have_the_same(shop: Any) -> None:
    async def main() -> None:
        await shop.confirm.adelay_on_commit(1)
        await shop.confirm.aapply_async_on_commit((2,), countdown=0)

    asyncio.run(main())

    assert shop.waiting() == 2


def test_wrong_arguments_are_refused_before_the_commit(shop: Any) -> None:
    from django.db import transaction

    with transaction.atomic(), pytest.raises(TypeError, match="cannot be called like that"):
        shop.confirm.delay_on_commit(1, 2)


def test_a_base_class_at_celerys_path(shop: Any) -> None:
    from amqtask.contrib.django.task import DjangoTask

    based = shop.task(base=DjangoTask, name="based")(lambda: None)

    based.delay_on_commit()

    assert shop.waiting() == 1
