"""Packets between parent and child."""

from __future__ import annotations

import socket

import pytest

from amqtask.execution.outcome import Outcome
from amqtask.testing.tasks import request
from amqtask_pools.prefork.frames import (
    LAST,
    PICKLE,
    PIECE,
    Joiner,
    cut,
    decode_outcomes,
    decode_request,
    encode_outcomes,
    encode_request,
    number_of,
    socket_pair,
)


def test_a_request_travels_without_its_delivery() -> None:
    sent = request(7, "add", 1, 2, queue="q", soft_limit=1.5, delivery=object())
    received = decode_request(encode_request(sent))

    assert received.to_frame() == sent.to_frame()
    assert received.delivery is None
    assert number_of(encode_request(sent)) == 7


def test_outcomes_travel_in_batches() -> None:
    sent = [Outcome(1, runtime=0.5), Outcome(2, reason="lost")]

    assert [Outcome._make(fields) for fields in decode_outcomes(encode_outcomes(sent))] == sent


def test_a_whole_message_is_told_from_pieces_and_words_by_its_first_byte() -> None:
    assert encode_request(request(1, "add"))[0] == encode_outcomes([Outcome(1)])[0] == PICKLE


@pytest.mark.parametrize("size", [PIECE + 1, 2 * PIECE, 2 * PIECE + 1, 1_000_000])
def test_a_long_message_is_cut_and_joined(size: int) -> None:
    message = bytes(range(256)) * (size // 256) + b"!" * (size % 256)
    packets = cut(message)
    joiner = Joiner()
    joined = [joiner.feed(memoryview(packet)) for packet in packets]

    assert max(map(len, packets)) <= PIECE + 1
    assert [packet[0] == LAST for packet in packets] == [False] * (len(packets) - 1) + [True]
    assert joined == [None] * (len(packets) - 1) + [message]


@pytest.mark.parametrize("kind", [None, socket.SOCK_DGRAM])
def test_either_holder_of_the_reading_end_gets_whole_packets(kind: int | None) -> None:
    ours, theirs = socket_pair(kind)
    for packet in (b"1", b"22", b"3" * PIECE):
        ours.send(packet)
    twin = theirs.dup()

    assert [theirs.recv(PIECE), twin.recv(PIECE), theirs.recv(PIECE)] == [b"1", b"22", b"3" * PIECE]
    with pytest.raises(BlockingIOError):
        twin.recv(PIECE, socket.MSG_DONTWAIT)
    for end in (ours, theirs, twin):
        end.close()
