"""Requests that are as nearly all are become entries in one loop. What comes of them is what comes of any request."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import pytest
from replica_group import key_of
from scripted_group import SYSTEM, Scripted, rid
from timetier.cluster.client.items import Put, put_requests
from timetier.cluster.errors import Rejected
from timetier.cluster.keys import MAX_BATCH_ITEMS, item_key, priority
from timetier.cluster.messages import (
    DELETE,
    INVALID,
    OK,
    PUT,
    STALE,
    WIPE,
    Ballot,
    Message,
    Value,
    Write,
    Written,
    pack_i64,
    pack_u32,
    unpack_i64,
)
from timetier.cluster.paxos.acceptor import Acceptor
from timetier.cluster.paxos.core import Settings
from timetier.cluster.paxos.flights import Arrivals, _Columns
from timetier.cluster.paxos.intake import Intake
from timetier.cluster.paxos.rows import (
    AFTER_ID,
    SHORT_ITEM,
    VOTE,
    decode_record,
    encode_record,
    record_head,
    record_of,
)
from timetier.cluster.paxos.timeline import Timeline

KINDS = [(PUT, b"x"), (DELETE, b""), (WIPE, b"")]
IDS = [b"", b"", b"", b"id", b"\x00" * 20, b"i" * 250]


def by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every request, acceptance and chosen entry go the way of single ones."""

    def requests(_: Intake, columns: Any, job: object, now: float) -> Iterable[int]:
        return range(len(columns.seen))

    def acceptances(_: Arrivals, columns: _Columns, found: object, ballot: object) -> tuple[list[int], int]:
        return list(range(len(columns.entries))), 0

    def chosen(_: Acceptor, entries: Iterable[tuple[Timeline, int]], ballot: Ballot) -> list[tuple[Timeline, int]]:
        return list(entries)

    monkeypatch.setattr(Intake, "_take_usual", requests)
    monkeypatch.setattr(Arrivals, "_accept_usual", acceptances)
    monkeypatch.setattr(Acceptor, "choose_all", chosen)


class Client:
    """Sends batches of random requests to the replica of first priority. `reached`: versions that it has seen."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        keys = (key_of(f"owner-{number}") for number in range(100_000))
        self.timelines = [key for _, key in zip(range(60), (k for k in keys if priority(k, 3)[0] == 0), strict=False)]
        self.reached = dict.fromkeys(self.timelines, 0)
        self.sent = 0
        self.used: dict[bytes, list[bytes]] = {key: [] for key in self.timelines}  # request ids

    def batch(self) -> Write:
        write = Write(1, [], [], b"", b"", b"", b"", [], [], 2000)
        seen, conditions, counts = [], [], []
        kinds = bytearray()
        for timeline in self.rng.sample(self.timelines, 40):  # of one timeline in one call there would be no order
            reached = self.reached[timeline]
            self.sent += 1
            request_id = rid(self.sent)
            if self.used[timeline] and self.rng.random() < 0.1:
                request_id = self.rng.choice(self.used[timeline])  # a retry
            self.used[timeline].append(request_id)
            write.timelines.append(timeline)
            write.request_ids.append(request_id if self.rng.random() < 0.98 else b"short")
            seen.append(max(0, reached - self.rng.choice([0, 0, 0, 0, 1, 12])))
            conditions.append(self.rng.choice([-1, -1, -1, reached, max(0, reached - 1)]))
            counts.append(self.rng.choice([1, 1, 1, 1, 2]))
            for _ in range(counts[-1]):
                kind, value = self.rng.choices(KINDS, [10, 2, 1])[0]
                item = b"" if kind == WIPE else item_key(self.rng.randrange(30), self.rng.choice(IDS))
                kinds.append(kind)
                write.keys.append(item if self.rng.random() < 0.98 else b"no item key")
                write.values.append(value * self.rng.randrange(100))
        write.seen, write.if_version, write.counts = pack_i64(seen), pack_i64(conditions), pack_u32(counts)
        write.kinds = bytes(kinds)
        return write

    def take(self, write: Write, answer: Message) -> None:
        assert isinstance(answer, Written)
        for timeline, version in zip(write.timelines, unpack_i64(answer.versions), strict=True):
            self.reached[timeline] = max(self.reached[timeline], version)


def outcome(seed: int) -> tuple[list[Written], list[dict[bytes, bytes]]]:
    """Answers to a client's batches, and the rows that each replica has afterwards."""
    group = Scripted(seed, settings=Settings(request_id_entries=8, log_keep_entries=8))
    client = Client(seed)
    answers = []
    for _ in range(40):
        write = client.batch()
        answer = group.call(0, write)
        client.take(write, answer)
        assert isinstance(answer, Written)
        answers.append(answer)
    group.run(2)
    rows = []
    for member in group.members:
        member.engine.commit()
        rows.append({name: row for name, row in member.engine._rows.items() if name[:1] in b"LRMC"})
    return answers, rows


@pytest.mark.parametrize("seed", range(4))
def test_answers_and_rows_are_those_that_each_request_would_have_by_itself(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, rows = outcome(seed)
    assert {OK, INVALID, STALE} <= {one for answer in answers for one in answer.outcomes}
    with monkeypatch.context() as patched:
        by_themselves(patched)
        assert outcome(seed) == (answers, rows)
    assert len(rows[0]) > 500


def test_nearly_all_requests_of_a_healthy_batch_go_the_usual_way(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Scripted(5)
    client = Client(5)
    others: list[int] = []
    usual = Intake._take_usual

    def watched(intake: Intake, columns: Any, job: Any, now: float) -> Any:
        rest = usual(intake, columns, job, now)
        others.append(len(rest))
        return rest

    monkeypatch.setattr(Intake, "_take_usual", watched)
    count = len(client.timelines)
    for entry in range(1, 4):
        ids = [rid(entry * 1_000 + at) for at in range(count)]
        columns = pack_i64([entry - 1] * count), pack_i64([-1] * count), pack_u32([1] * count)
        keys, values = [item_key(entry)] * count, [b"v"] * count
        answer = group.call(0, Write(1, client.timelines, ids, *columns, bytes(count), keys, values, 2000))
        assert isinstance(answer, Written)
        assert set(answer.outcomes) == {OK}
    assert others == [count, 0, 0], "first entries are durable before they are sent"


def test_records_that_are_put_together_are_what_the_encoder_makes() -> None:
    rng = random.Random(1)
    for _ in range(500):
        life = (rng.randrange(5), rng.randrange(1 << 40), rng.randrange(1 << 62))
        written, kind = rng.choice([0, 5, 1_700_000_000_000_000, -3]), rng.choice([PUT, DELETE])
        request_id, item = rng.randbytes(16), rng.randbytes(rng.choice([10, 12, 100, SHORT_ITEM]))
        value = Value(life, written, [request_id], bytes((kind,)), [item], [b""])
        encoded = encode_record(record_of((0, life), value))
        assert record_head((0, life), written) + request_id + AFTER_ID[kind][len(item)] + item + VOTE == encoded
        assert decode_record(encoded).keys == [item]


def test_an_accepted_entry_is_told_in_full_while_it_is_open() -> None:
    """It is kept as columns; a promise, a replacement and a reader need all of it."""
    group = Scripted(3)
    timelines = Client(3).timelines[:5]
    count = len(timelines)
    for entry in (1, 2):
        columns = pack_i64([entry - 1] * count), pack_i64([-1] * count), pack_u32([1] * count)
        ids = [rid(entry * 100 + at) for at in range(count)]
        message = Write(1, timelines, ids, *columns, bytes(count), [item_key(7)] * count, [b"v"] * count, 2000)
        holds = entry == 2
        group.holds = lambda _s, _t, _m, holds=holds: holds  # type: ignore[misc]
        group.replica(0).write(group.now, entry, message)
        group.pump(0)
        group.run(0.05)
    core = group.replica(0).core
    for at, key in enumerate(timelines):
        timeline = core.timeline(key)
        assert type(timeline.facts) is tuple
        assert timeline.record is not None
        assert (timeline.record.ballot, timeline.record.origin) == ((0, core.life), core.life)
        assert timeline.record.vote
        assert (timeline.record.request_ids, timeline.record.keys) == ([rid(200 + at)], [item_key(7)])
        value = group.replica(0).acceptor.accepted_value(timeline)
        assert value is not None
        assert (value.kinds, value.values, value.origin) == (bytes((PUT,)), [b"v"], core.life)


def test_a_system_timeline_never_goes_the_usual_way() -> None:
    """What its entries say is judged when they come, and has chores when they are chosen."""
    group = Scripted(4)
    columns = pack_i64([0]), pack_i64([-1]), pack_u32([1])
    first = priority(SYSTEM, 3)[0]
    for number in range(2):
        write = Write(1, [SYSTEM], [rid(number)], *columns, bytes((PUT,)), [item_key(1)], [b"no link"], 2000)
        answer = group.call(first, write)
        assert isinstance(answer, Written)
        assert answer.outcomes == bytes((INVALID,))


# ---------------------------------------------------------------- the client's arguments


def plain(count: int) -> list[Any]:
    return [(f"owner-{number}", number - 5, b"v" * number) for number in range(count)]


@pytest.mark.parametrize(
    "items",
    [
        plain(50),
        [Put(*item) for item in plain(50)],
        [Put(owner, timestamp, value, "") for owner, timestamp, value in plain(3)],
        [Put(owner, timestamp, value, "name") for owner, timestamp, value in plain(3)],
        [*plain(3), Put("owner-1", 9, b"x")],
        [*plain(3), ("owner-2", -3, b"later wins")],
        [("owner", 1, b"a"), (b"owner", 2, b"b")],
    ],
)
def test_arguments_give_the_same_requests_in_columns_and_one_by_one(items: list[Any]) -> None:
    requests, places = put_requests(b"t", 16, items)
    single = [put_requests(b"t", 16, [item, item]).requests[0] for item in items]  # one by one, as it comes twice
    together: dict[bytes, dict[bytes, bytes]] = {}
    for request in single:
        together.setdefault(request.timeline, {})[request.keys[0]] = request.values[0]
    assert [request.timeline for request in requests] == list(together)
    assert [requests[place].timeline for place in places] == [request.timeline for request in single]
    for request in requests:
        assert dict(zip(request.keys, request.values, strict=True)) == together[request.timeline]
        assert request.kinds == bytes((PUT,)) * len(request.keys)
        assert request.size_bytes >= len(request.timeline) + sum(map(len, request.keys + request.values))


@pytest.mark.parametrize(
    "wrong",
    [
        ("owner", 1 << 63, b"v"),
        ("owner", True, b"v"),
        ("owner", 1, "v"),
        ("", 1, b"v"),
        ("owner", 1, bytes(2 << 20)),
        7,
    ],
)
def test_a_wrong_item_among_plain_ones_is_named_by_its_position(wrong: Any) -> None:
    with pytest.raises(Rejected, match="item 3"):
        put_requests(b"t", 16, [*plain(3), wrong, *plain(2)])


def test_items_without_an_end_are_refused() -> None:
    def endless() -> Iterable[Any]:
        number = 0
        while True:
            number += 1
            yield f"owner-{number}", number, b"v"

    with pytest.raises(Rejected, match=f"more than {MAX_BATCH_ITEMS}"):
        put_requests(b"t", 16, endless())
