"""Frames on a byte stream: whatever the pieces, what comes out is what was sent, and stays so."""

from __future__ import annotations

import random

import pytest
from timetier.cluster.carriers.framing import HEADER, REPLY, FrameParser


@pytest.mark.parametrize("seed", range(20))
def test_frames_of_all_sizes_come_out_of_any_pieces_and_never_change_afterwards(seed: int) -> None:
    rng = random.Random(seed)
    sizes = [rng.choice([0, 1, 100, 5_000, 65_535, 65_536, 300_000]) for _ in range(25)]
    frames = [(number + 1, REPLY, rng.randbytes(size)) for number, size in enumerate(sizes)]
    stream = b"".join(HEADER.pack(len(payload), call_id, kind) + payload for call_id, kind, payload in frames)
    parser = FrameParser()
    found = []
    at = 0
    while at < len(stream):
        end = at + rng.choice([1, 7, 100, 4_096, 65_536, 262_144])
        parser.feed(stream[at:end])
        at = end
        while (frame := parser.next()) is not None:
            found.append(frame)
    assert [(call_id, kind, bytes(payload)) for call_id, kind, payload in found] == frames
    assert parser.held_bytes == 0


def test_an_incomplete_frame_is_all_that_a_parser_holds() -> None:
    parser = FrameParser()
    payload = bytes(1_000)
    parser.feed(HEADER.pack(len(payload), 1, REPLY) + payload + HEADER.pack(500_000, 2, REPLY) + bytes(10))
    assert parser.next() is not None
    assert parser.next() is None
    assert parser.held_bytes == HEADER.size + 10
    for _ in range(49):
        parser.feed(bytes(10_000))
        assert parser.next() is None
    assert parser.held_bytes == HEADER.size + 10 + 490_000
    parser.feed(bytes(9_990))
    frame = parser.next()
    assert frame is not None and frame[0] == 2 and len(frame[2]) == 500_000
    assert parser.held_bytes == 0
