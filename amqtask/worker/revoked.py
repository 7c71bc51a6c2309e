"""The ids of revoked tasks: bounded in number and age, as in Celery (50,000 ids, 3 hours)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

MAX_IDS = 50_000
EXPIRES_SECONDS = 10_800.0


class RevokedIds:
    """Task ids with the time they were revoked at; falsy while empty, so that the hot path skips it."""

    def __init__(self, *, max_ids: int = MAX_IDS, expires: float = EXPIRES_SECONDS) -> None:
        self._max_ids = max_ids
        self._expires = expires
        self._since: OrderedDict[str, float] = OrderedDict()

    def add(self, task_ids: Iterable[str], now: float) -> None:
        """Revoke; an id that is known already starts its time again."""
        for task_id in task_ids:
            self._since[task_id] = now
            self._since.move_to_end(task_id)
        self.purge(now)

    def discard(self, task_id: str) -> None:
        self._since.pop(task_id, None)

    def purge(self, now: float) -> None:
        """Forget what is too old or too many."""
        while self._since:
            oldest, since = next(iter(self._since.items()))
            if len(self._since) <= self._max_ids and now - since < self._expires:
                return
            del self._since[oldest]

    def as_dict(self) -> dict[str, float]:
        """For a state file and for `hello`: id to the time it was revoked at."""
        return dict(self._since)

    def update(self, ids: dict[str, float], now: float) -> None:
        """Take over what another worker or a state file knows."""
        for task_id, since in sorted(ids.items(), key=lambda item: item[1]):
            self._since.setdefault(task_id, since)
        self._since = OrderedDict(sorted(self._since.items(), key=lambda item: item[1]))
        self.purge(now)

    def __contains__(self, task_id: object) -> bool:
        return task_id in self._since

    def __len__(self) -> int:
        return len(self._since)
