"""Chords counted in Redis, under Celery's keys and in its encoding, so that workers of both systems end one header together.

`celery-taskset-meta-<group>` plus a suffix (celery/backends/redis.py): `.j` the parts (a sorted set by index; a list with
`result_chord_ordered` False), `.t` how many members were added, `.s` how many were published, `.d` which members have
ended, `.c` who publishes the body, then `done`; and ours alone: `.b` the id of the body, which our workers' parts must know.
A part is `[1, task id, state, result]`. Without a suffix: the group's shape, where Celery saved it.

The claim `.c` holds the id of the member that completed the chord, not a random token: that member's message is unanswered
until the body is confirmed, so after a crash it comes again, finds its own claim, and publishes the body then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from amqtask.exceptions import EncodeError
from amqtask.ground.printable import described
from amqtask.protocol.result import ResultMessage
from amqtask.protocol.serialization import dumps, loads

# KEYS: j t s d b c; ARGV: member, value, score ("" for a list), expiry of the parts, expiry of the claim, task id, body's id
ADD_PART = """
local body = redis.call('GET', KEYS[5])
if body and body ~= ARGV[7] then return false end
if redis.call('GET', KEYS[6]) == 'done' then return false end
if redis.call('SADD', KEYS[4], ARGV[1]) == 1 then
  if ARGV[3] == '' then redis.call('RPUSH', KEYS[1], ARGV[2]) else redis.call('ZADD', KEYS[1], ARGV[3], ARGV[2]) end
end
if tonumber(ARGV[4]) > 0 then
  for i = 1, 5 do redis.call('EXPIRE', KEYS[i], ARGV[4]) end
end
local size = redis.call('GET', KEYS[3])
if not size then return false end
local ended = redis.call('SCARD', KEYS[4])
if ended < tonumber(size) + tonumber(redis.call('GET', KEYS[2]) or 0) then return false end
local claim = redis.call('GET', KEYS[6])
if claim and claim ~= ARGV[6] then return false end
redis.call('SET', KEYS[6], ARGV[6], 'EX', ARGV[5])
if ARGV[3] == '' then return redis.call('LRANGE', KEYS[1], 0, -1) end
return redis.call('ZRANGE', KEYS[1], 0, -1)
"""
# KEYS: a t; ARGV: task id, expiry. `.a` is ours: who is added again counts once.
ADD_MEMBER = """
if redis.call('SADD', KEYS[1], ARGV[1]) == 1 then redis.call('INCR', KEYS[2]) end
if tonumber(ARGV[2]) > 0 then
  for i = 1, 2 do redis.call('EXPIRE', KEYS[i], ARGV[2]) end
end
"""
CLAIM_SECONDS = 3600
# How long a member that comes again after the body has run is recognised.
DONE_SECONDS = 3600
Retrying = Callable[[Callable[[Any], Any]], Any]


class RedisChords:
    """See amqtask.execution.contract.ChordStore; `retrying(work)` calls `work(client)` while the server is away.

    `expires` is seconds or None; `is_tagged` is for a cluster.
    """

    def __init__(
        self,
        retrying: Retrying,
        *,
        prefix: str,
        serializer: str,
        content_type: str,
        content_encoding: str,
        accept: frozenset[str],
        expires: float | None,
        is_ordered: bool = True,
        is_tagged: bool = False,
    ) -> None:
        self._retrying = retrying
        self._prefix = f"{prefix}celery-taskset-meta-"
        self._serializer = serializer
        self._format = (content_type, content_encoding, accept)
        self._expires = max(1, int(expires)) if expires else 0
        self._is_ordered = is_ordered
        self._is_tagged = is_tagged

    def set_chord_size(self, group_id: str, size: int, body_id: str = "") -> None:
        """Open a chord: a header of `size` members is about to be published. Raises: BackendUnreachable."""

        def write(client: Any) -> None:
            pipeline = client.pipeline(transaction=False)
            pipeline.delete(self._key(group_id, ".c"))
            pipeline.set(self._key(group_id, ".s"), size, ex=self._expires or None)
            if body_id:
                pipeline.set(self._key(group_id, ".b"), body_id, ex=self._expires or None)
            else:
                pipeline.delete(self._key(group_id, ".b"))
            pipeline.execute()

        self._retrying(write)

    def add_chord_part(
        self, group_id: str, index: int | None, part: ResultMessage, body_id: str = ""
    ) -> list[object] | None:
        """Add the part of a member that has ended; all parts when it completes the chord.

        Raises: EncodeError, BackendUnreachable."""
        try:
            value = dumps([1, part.task_id, part.status, part.result], self._serializer).body
        except EncodeError as error:
            raise EncodeError(
                f"the result of task {part.task_id}, {described(part.result)}, cannot go to its chord: {error}"
            ) from error
        score = "+inf" if index is None else str(index)
        keys = [self._key(group_id, suffix) for suffix in (".j", ".t", ".s", ".d", ".b", ".c")]
        arguments = [
            f"{part.task_id}:{score}",
            value,
            score if self._is_ordered else "",
            self._expires,
            CLAIM_SECONDS,
            part.task_id,
            body_id,
        ]
        raw_parts = self._retrying(lambda client: client.eval(ADD_PART, len(keys), *keys, *arguments))
        if raw_parts is None:
            return None
        parts = [self._read(raw_part) for raw_part in raw_parts]
        return self._shaped(group_id, parts)

    def add_to_chord(self, group_id: str, task_id: str) -> None:
        """Add a member to the chord. Raises: BackendUnreachable."""
        keys = [self._key(group_id, ".a"), self._key(group_id, ".t")]
        self._retrying(lambda client: client.eval(ADD_MEMBER, 2, *keys, task_id, self._expires))

    def end_chord(self, group_id: str, body_id: str = "") -> None:
        """The body has run: delete the parts. Raises: BackendUnreachable."""

        def write(client: Any) -> None:
            stored_body_id = client.get(self._key(group_id, ".b"))
            if stored_body_id is not None and stored_body_id.decode() != body_id:
                return  # some other message that bears this group's id
            pipeline = client.pipeline(transaction=False)
            for suffix in (".j", ".t", ".s", ".d", ".a", ".b"):  # one by one: a cluster's pipeline takes no list
                pipeline.delete(self._key(group_id, suffix))
            pipeline.set(self._key(group_id, ".c"), "done", ex=DONE_SECONDS)
            pipeline.execute()

        self._retrying(write)

    # -- groups

    def save_group(self, group_id: str, members: object) -> None:
        """Keep a group's results (their ids). Raises: BackendUnreachable."""
        body = dumps({"result": members}, self._serializer).body
        self._retrying(lambda client: client.set(self._key(group_id), body, ex=self._expires or None))

    def restore_group(self, group_id: str) -> Any:
        """What `save_group`, ours or Celery's, kept; None when there is nothing. Raises: BackendUnreachable."""
        body = self._retrying(lambda client: client.get(self._key(group_id)))
        return None if body is None else loads(body, *self._format)["result"]

    def delete_group(self, group_id: str) -> None:
        """Forget it. Raises: BackendUnreachable."""
        self._retrying(lambda client: client.delete(self._key(group_id)))

    def _key(self, group_id: str, suffix: str = "") -> str:
        # A cluster keeps the keys of one group together by what is in braces, as its scripts need it.
        return f"{self._prefix}{{{group_id}}}{suffix}" if self._is_tagged else f"{self._prefix}{group_id}{suffix}"

    def _read(self, part: bytes) -> ResultMessage:
        _, task_id, state, result = loads(part, *self._format)
        return ResultMessage(task_id, state, result)

    def _shaped(self, group_id: str, parts: list[ResultMessage]) -> list[Any]:
        """Celery saves the shape of a header whose members end in groups: their parts are lists in the body's argument."""
        saved = self.restore_group(group_id)
        if saved is None:
            return parts
        by_id: Mapping[str, ResultMessage] = {part.task_id: part for part in parts}
        _, members = saved
        return [_in_shape(member, by_id) for member in members or ()]


def _in_shape(member: Any, parts: Mapping[str, ResultMessage]) -> object:
    (task_id, _), children = member
    if children is None:
        return parts[task_id]
    return [_in_shape(child, parts) for child in children]
