"""The checker finds what is wrong, and nothing else: by hand, against brute force, against another checker."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import permutations
from random import Random
from typing import Any

import msgspec
import pytest
from detangle import lin

from .history import (
    Arguments,
    Conflict,
    Done,
    Expire,
    Get,
    Item,
    Operation,
    Page,
    ReadPage,
    Refused,
    Result,
    Seen,
    Unknown,
    Write,
    delete,
    put,
    wipe,
)
from .linearizability import check_history, linearizable
from .random_histories import good_history, spoilt

Line = tuple[str, Arguments, Result | None, float, float | None]


def history(*lines: Line) -> list[Operation]:
    """Operations of the timeline `t` from (client, arguments, result, called, returned)."""
    return [
        Operation(client, "t", type(arguments).__name__.lower(), arguments, result, called, returned, number)
        for number, (client, arguments, result, called, returned) in enumerate(lines)
    ]


def x(value: str) -> Write:
    """Write of item 1."""
    return Write((put(1, value),))


def get(value: str | None, version: int | None = None, of: int | None = None) -> tuple[Get, Item]:
    """Read of item 1."""
    return Get((1, "")), Item(Seen((1, ""), value, of) if value is not None else None, version)


def page(*keys: int, limit: int = 10, before: int | None = None, more: bool = False, version: int | None = None) -> Any:
    """Page of items whose values are their keys."""
    bound = (before, "") if before is not None else None
    return ReadPage(bound, limit), Page(tuple(Seen((key, ""), str(key)) for key in keys), more, version)


def write_all(*keys: int) -> Write:
    """Write of items whose values are their keys."""
    return Write(tuple(put(key, str(key)) for key in keys))


GOOD: dict[str, list[Operation]] = {
    "nothing": [],
    "an item is there until it expires, and is never seen when it is written afterwards": history(
        ("a", write_all(1, 5), Done(1), 0, 1),
        ("b", *page(5, 1, version=1), 2, 3),
        ("sink", Expire(3), Done(), 2, 9),
        ("b", *page(5, version=1), 4, 5),
        ("a", x("2"), Done(2), 10, 11),
        ("b", *get(None, 2), 12, 13),
    ),
    "nobody knows whether items have expired": history(
        ("a", write_all(1, 5), Done(1), 0, 1), ("sink", Expire(3), None, 2, None), ("b", *page(5, 1, version=1), 8, 9)
    ),
    "write, then read": history(("a", x("1"), Done(1), 0, 1), ("b", *get("1", 1, 1), 2, 3)),
    "read in the middle of a write, before it": history(("a", x("1"), Done(1), 0, 9), ("b", *get(None, 0), 1, 2)),
    "read in the middle of a write, after it": history(("a", x("1"), Done(1), 0, 9), ("b", *get("1", 1), 1, 2)),
    "two writes share an entry, the later wins": history(
        ("a", x("1"), Done(1), 0, 5), ("b", x("2"), Done(1), 1, 4), ("c", *get("2", 1, 1), 6, 7)
    ),
    "unknown write seen much later": history(
        ("a", x("1"), Unknown(), 0, None), ("b", *get(None, 0), 1, 2), ("b", *get("1", 1, 1), 8, 9)
    ),
    "unknown write never seen": history(
        ("a", x("1"), Unknown(), 0, None), ("b", x("2"), Done(1), 1, 2), ("b", *get("2", 1, 1), 8, 9)
    ),
    "call cut off by the end": history(("a", x("1"), Unknown(), 0, None), ("b", *get("1", 1, 1), 1, 2)),
    "refused write not seen": history(("a", x("1"), Refused(), 0, 1), ("b", *get(None, 0), 2, 3)),
    "condition met and condition missed": history(
        ("a", x("1"), Done(1), 0, 1),
        ("a", Write((put(1, "2"),), 1), Done(2), 2, 3),
        ("b", Write((put(1, "3"),), 1), Conflict(2), 2, 5),
        ("b", *get("2", 2, 2), 6, 7),
    ),
    "unknown conditional write that met another version": history(
        ("a", x("1"), Done(1), 0, 1),
        ("b", Write((put(1, "2"),), 0), Unknown(), 2, None),
        ("a", *get("1", 1, 1), 3, 4),
    ),
    "deleted timeline": history(
        ("a", write_all(1, 2), Done(1), 0, 1),
        ("a", Write((wipe(),)), Done(2), 2, 3),
        ("a", *page(version=2), 4, 5),
    ),
    "pages": history(
        ("a", write_all(1, 2, 3), Done(1), 0, 1),
        ("b", *page(3, 2, limit=2, more=True, version=1), 2, 3),
        ("b", *page(1, limit=2, before=2, version=1), 4, 5),
    ),
    "page cut short because its items are large": history(
        ("a", write_all(1, 2, 3), Done(1), 0, 1), ("b", *page(3, limit=2, more=True, version=1), 2, 3)
    ),
    "page while items come and go": history(
        ("a", write_all(1, 2), Done(1), 0, 1),
        ("a", Write((delete(2),)), Done(2), 2, 9),
        ("b", *page(2, 1, version=1), 3, 4),
        ("b", *page(1, version=2), 5, 6),
    ),
    "no versions at all": history(
        ("a", x("1"), Done(), 0, 5), ("b", x("2"), Done(), 1, 4), ("c", *get("1"), 6, 7), ("c", *get("1"), 8, 9)
    ),
}

BAD: dict[str, list[Operation]] = {
    "an expired item is seen again": history(
        ("a", write_all(1, 5), Done(1), 0, 1),
        ("sink", Expire(3), Done(), 2, 9),
        ("b", *page(5, version=1), 4, 5),
        ("c", *page(5, 1, version=1), 6, 7),
    ),
    "an item is seen after it has expired for sure": history(
        ("a", write_all(1, 5), Done(1), 0, 1), ("sink", Expire(3), Done(), 2, 3), ("b", *page(5, 1, version=1), 4, 5)
    ),
    "an item is gone before it could expire": history(
        ("a", write_all(1, 5), Done(1), 0, 1), ("b", *page(5, version=1), 2, 3), ("sink", Expire(3), Done(), 4, 5)
    ),
    "stale read": history(
        ("a", x("1"), Done(1), 0, 1), ("a", x("2"), Done(2), 2, 3), ("b", *get("1"), 4, 5)
    ),
    "new value, then the old one": history(
        ("a", x("1"), Done(1), 0, 1), ("a", x("2"), Done(2), 2, 9), ("b", *get("2"), 3, 4), ("b", *get("1"), 5, 6)
    ),
    "lost write": history(("a", x("1"), Done(1), 0, 1), ("b", *get(None), 2, 3)),
    "lost write, seen by its version only": history(("a", x("1"), Done(1), 0, 1), ("b", x("2"), Done(1), 2, 3)),
    "write applied twice": history(
        ("a", x("1"), Done(1), 0, 1),
        ("b", x("2"), Done(2), 2, 3),
        ("c", *get("1", 3), 4, 5),
    ),
    "write applied twice, seen by its version only": history(
        ("a", x("1"), Done(1), 0, 1), ("c", *get("1", 2, 2), 4, 5)
    ),
    "refused write seen": history(("a", x("1"), Refused(), 0, 1), ("b", *get("1"), 2, 3)),
    "value that nobody wrote": history(("a", x("1"), Done(1), 0, 1), ("b", *get("7"), 2, 3)),
    "read from the future": history(("b", *get("1"), 0, 1), ("a", x("1"), Done(1), 2, 3)),
    "unknown write seen, then unseen": history(
        ("a", x("1"), Unknown(), 0, None), ("b", *get("1"), 1, 2), ("b", *get(None), 3, 4)
    ),
    "torn write of two items": history(
        ("a", write_all(1, 2), Unknown(), 0, None), ("b", *page(1), 1, 2), ("b", *page(2, 1), 3, 4)
    ),
    "page with a gap": history(("a", write_all(1, 2, 3), Done(1), 0, 1), ("b", *page(3, 1), 2, 3)),
    "page that misses the newest": history(("a", write_all(1, 2, 3), Done(1), 0, 1), ("b", *page(2, 1), 2, 3)),
    "page that ends too early": history(("a", write_all(1, 2, 3), Done(1), 0, 1), ("b", *page(3, 2), 2, 3)),
    "page out of order": history(("a", write_all(1, 2), Done(1), 0, 1), ("b", *page(1, 2), 2, 3)),
    "page longer than its limit": history(
        ("a", write_all(1, 2), Done(1), 0, 1), ("b", *page(2, 1, limit=1), 2, 3)
    ),
    "token that skips an item": history(
        ("a", write_all(1, 2, 3), Done(1), 0, 1), ("b", *page(1, before=3), 2, 3)
    ),
    "conditional write on the wrong version": history(
        ("a", x("1"), Done(1), 0, 1),
        ("a", x("2"), Done(2), 2, 3),
        ("b", Write((put(1, "3"),), 1), Done(3), 4, 5),
    ),
    "two conditional writes on one version": history(
        ("a", Write((put(1, "1"),), 0), Done(1), 0, 5), ("b", Write((put(1, "2"),), 0), Done(1), 1, 4)
    ),
    "conflict with its own version": history(
        ("a", x("1"), Done(1), 0, 1), ("b", Write((put(1, "3"),), 1), Conflict(1), 4, 5)
    ),
    "conflict with a version long gone": history(
        ("a", x("1"), Done(1), 0, 1),
        ("a", x("2"), Done(2), 2, 3),
        ("b", Write((put(1, "3"),), 0), Conflict(1), 4, 5),
    ),
    "conditional write that shares an entry": history(
        ("a", Write((put(1, "1"),), 0), Done(1), 0, 5), ("b", x("2"), Done(1), 1, 4)
    ),
    "one version, two contents": history(
        ("a", x("1"), Done(1), 0, 9),
        ("b", write_all(2), Done(1), 0, 9),
        ("c", *get(None, 1), 1, 2),
    ),
    "one entry, though one write was called after the other had returned": history(
        ("a", x("1"), Done(1), 0, 1), ("b", write_all(2), Done(1), 2, 3)
    ),
    "version goes back": history(
        ("a", x("1"), Done(1), 0, 1),
        ("a", x("2"), Done(2), 2, 9),
        ("b", *get("2", 2), 3, 4),
        ("b", *get(None, 1), 5, 6),
    ),
    "wiped items shown again": history(
        ("a", write_all(1, 2), Done(1), 0, 1),
        ("a", Write((wipe(),)), Done(2), 2, 3),
        ("b", *page(1, version=2), 4, 5),
    ),
    "deleted item shown again": history(
        ("a", write_all(1, 2), Done(1), 0, 1),
        ("a", Write((delete(1),)), Done(2), 2, 3),
        ("b", *page(2, 1, version=2), 4, 5),
    ),
    "wrong version of an item": history(
        ("a", x("1"), Done(1), 0, 1), ("a", write_all(2), Done(2), 2, 3), ("b", *get("1", 2, 2), 4, 5)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_a_good_history_passes(name: str) -> None:
    report = check_history(GOOD[name])
    assert report.ok, report.violations[0].witness


@pytest.mark.parametrize("name", BAD)
def test_a_bad_history_is_found_and_shown(name: str) -> None:
    report = check_history(BAD[name])
    assert not report.ok and not report.undecided
    assert [violation.timeline for violation in report.violations] == ["t"]
    assert "no order of these" in report.violations[0].witness
    assert len(report.violations[0].witness.splitlines()) <= len(BAD[name]) + 1


@pytest.mark.parametrize("name", [name for name in GOOD if name not in ("nothing", "no versions at all")])
def test_one_wrong_value_makes_a_good_history_bad(name: str) -> None:
    """Any value that was seen, replaced by one that nobody wrote."""
    for operation in GOOD[name]:
        if isinstance(operation.result, Item) and operation.result.item is not None:
            wrong = Item(Seen(operation.result.item.key, "nobody's"), operation.result.version)
            others = [op for op in GOOD[name] if op is not operation]
            assert not check_history([*others, msgspec.structs.replace(operation, result=wrong)]).ok


def test_timelines_are_independent() -> None:
    good, bad = GOOD["write, then read"], BAD["lost write"]
    renamed = [msgspec.structs.replace(operation, timeline="u") for operation in bad]
    report = check_history([*good, *renamed])
    assert [violation.timeline for violation in report.violations] == ["u"]


def test_an_impossible_record_is_an_error() -> None:
    with pytest.raises(ValueError, match="before it is called"):
        check_history(history(("a", x("1"), Done(1), 5, 4)))


def test_what_takes_too_long_is_undecided_and_never_passes() -> None:
    lines: list[Line] = [(f"c{n}", Write((put(n, f"v{n}"),)), Unknown(), float(n), None) for n in range(20)]
    lines.append(("r", Get((99, "")), Item(Seen((99, ""), "nobody's")), 50.0, 51.0))
    report = check_history(history(*lines), effort=2_000)
    assert not report.ok
    assert report.undecided == ["t"] and not report.violations


@pytest.mark.parametrize("told_share", [1.0, 0.7])
def test_histories_of_a_right_store_pass_quickly(told_share: float) -> None:
    for seed in range(25):
        operations = good_history(Random(seed), 200, clients=10, keys=8, give_up_share=0.03, told_share=told_share)
        began = time.perf_counter()
        assert linearizable(operations), seed
        assert time.perf_counter() - began < 5.0, seed


def test_a_witness_is_bad_by_itself_and_small() -> None:
    """Half of the spoilt histories of 200 operations are bad; a dozen operations show it."""
    lines = []
    for seed in range(20):
        random = Random(seed)
        report = check_history(spoilt(random, good_history(random, 200, clients=10, keys=8, give_up_share=0.01)))
        lines += [len(violation.witness.splitlines()) for violation in report.violations]
    assert len(lines) >= 8
    assert sorted(lines)[len(lines) // 2] <= 12, lines


# ---- against other judges


class IndependentTimeline(lin.Model):
    """The same timeline written a second time, for `detangle`: a state is the set of all that it may be.

    One of them is (version, first return of a write of the last entry or None if somebody has looked, items).
    """

    def init(self) -> Any:
        return frozenset({(0, None, frozenset())})

    def step(self, state: Any, op: Any) -> tuple[bool, Any]:
        operation, known = op.arg, op.status == "ok"
        following = set()
        for version, entry, items in state:
            following.update(self._after(version, entry, items, operation, known))
        return bool(following), frozenset(following)

    def _after(self, version: int, entry: Any, items: Any, operation: Operation, known: bool) -> Any:
        asked: Any = operation.arguments
        got: Any = operation.result
        told = getattr(got, "version", None) if known else None
        if isinstance(asked, Write) and not isinstance(got, Conflict):
            if asked.if_version is not None and asked.if_version != version:
                return
            if told in (None, version + 1):
                end = None if asked.if_version is not None else self._end(operation)
                yield version + 1, end, self._written(items, asked, version + 1)
            overlaps = entry is not None and operation.called_at <= entry
            if overlaps and asked.if_version is None and told in (None, version):
                yield version, min(entry, self._end(operation)), self._written(items, asked, version)
            return
        if told not in (None, version):
            return
        if isinstance(asked, Write):
            right = asked.if_version != version
        elif isinstance(asked, Get):
            found = [row for row in items if row[0] == asked.key]
            right = self._agree(found, [got.item] if got.item is not None else [])
        else:
            below = sorted((row for row in items if asked.before is None or row[0] < asked.before), reverse=True)
            right = self._agree(below[: len(got.items)], got.items) and (got.more or len(below) == len(got.items))
            right = right and len(got.items) <= asked.limit
        if right:
            yield version, None, items

    @staticmethod
    def _end(operation: Operation) -> float:
        return float("inf") if operation.returned_at is None else operation.returned_at

    @staticmethod
    def _written(items: Any, write: Write, version: int) -> Any:
        for mutation in write.mutations:
            items = frozenset(row for row in items if mutation.key is not None and row[0] != mutation.key)
            if mutation.action == "put":
                items |= {(mutation.key, mutation.value, version)}
        return items

    @staticmethod
    def _agree(rows: Any, seen: Any) -> bool:
        return len(rows) == len(seen) and all(
            row[0] == item.key and row[1] == item.value and item.version in (None, row[2])
            for row, item in zip(rows, seen, strict=True)
        )


def as_they_are(operation: Operation) -> tuple[str, Any, Any]:
    """An operation for `IndependentTimeline`."""
    return "do", operation, None


def in_words_of_a_map(operation: Operation) -> tuple[str, Any, Any]:
    """An operation on one item for detangle's map: what, with what, what came back."""
    asked, got = operation.arguments, operation.result
    if isinstance(asked, Get):
        return "get", (asked.key,), got.item.value if isinstance(got, Item) and got.item is not None else None
    assert isinstance(asked, Write)
    mutation = asked.mutations[0]
    if mutation.action == "put":
        return "put", (mutation.key, mutation.value), None
    return "delete", (mutation.key,), None


def by_detangle(
    operations: list[Operation],
    model: lin.Model,
    words: Callable[[Operation], tuple[str, Any, Any]] = as_they_are,
) -> bool:
    """What the other checker says."""
    instants = sorted({op.called_at for op in operations} | {op.returned_at for op in operations if op.returned_at})
    rank = {instant: place for place, instant in enumerate(instants, 1)}
    translated = []
    for index, op in enumerate(operations):
        if isinstance(op.result, Refused) or (op.is_unknown and not isinstance(op.arguments, Write)):
            continue
        name, argument, output = words(op)
        status, returned = ("info", None) if op.returned_at is None else ("ok", rank[op.returned_at])
        translated.append(
            lin.Operation(index, op.client, name, argument, rank[op.called_at], 0.0, output, status, returned)
        )
    return lin.check(translated, model).ok


def by_brute_force(operations: list[Operation]) -> bool:
    """Whether any order of any choice of the unknown operations is right."""
    model = IndependentTimeline()
    known = [op for op in operations if not op.is_unknown]
    unknown = [op for op in operations if op.is_unknown and isinstance(op.arguments, Write)]
    for choice in range(1 << len(unknown)):
        chosen = known + [op for bit, op in enumerate(unknown) if choice >> bit & 1]
        if any(_is_right(model, order) for order in permutations(chosen)):
            return True
    return False


def _is_right(model: IndependentTimeline, order: tuple[Operation, ...]) -> bool:
    earliest = float("inf")
    for op in reversed(order):
        if op.called_at > earliest:
            return False
        earliest = min(earliest, float("inf") if op.returned_at is None else op.returned_at)
    state = model.init()
    for index, op in enumerate(order):
        step = lin.Operation(index, op.client, "do", op, 0, 0.0, status="info" if op.is_unknown else "ok")
        right, state = model.step(state, step)
        if not right:
            return False
    return True


def small_histories(count: int, size: int, base: int) -> list[tuple[int, list[Operation]]]:
    """Random small histories, good and spoilt ones."""
    histories = []
    for seed in range(base, base + count):
        random = Random(seed)
        told_share = random.choice([1.0, 0.5, 0.0])
        operations = good_history(random, size, clients=3, keys=2, give_up_share=0.15, told_share=told_share)
        for _ in range(random.choice([0, 1, 1, 2])):
            operations = spoilt(random, operations)
        histories.append((seed, operations))
    return histories


def test_it_agrees_with_detangle_on_random_histories() -> None:
    verdicts = []
    for seed, operations in small_histories(400, 12, base=0):
        verdict = linearizable(operations)
        assert verdict == by_detangle(operations, IndependentTimeline()), seed
        verdicts.append(verdict)
    assert verdicts.count(True) > 50 and verdicts.count(False) > 50


def test_it_agrees_with_brute_force_on_random_histories() -> None:
    verdicts = []
    for seed, operations in small_histories(150, 6, base=1_000):
        verdict = linearizable(operations)
        assert verdict == by_brute_force(operations), seed
        verdicts.append(verdict)
    assert verdicts.count(True) > 20 and verdicts.count(False) > 20


def test_it_agrees_with_detangles_own_model_of_a_map() -> None:
    """Single items without versions, in the operations that `detangle` knows."""
    verdicts = []
    for seed in range(300):
        random = Random(seed)
        operations = good_history(random, 25, clients=4, keys=2, give_up_share=0.1, told_share=0.0)
        # What the operations that are left out have written is now a value that nobody wrote: many of these are bad.
        operations = [op for op in (spoilt(random, operations) if seed % 3 else operations) if _is_of_a_map(op)]
        verdict = linearizable(operations)
        assert verdict == by_detangle(operations, lin.KV(), in_words_of_a_map), seed
        verdicts.append(verdict)
    assert verdicts.count(True) > 20 and verdicts.count(False) > 20


def _is_of_a_map(operation: Operation) -> bool:
    if isinstance(operation.arguments, Get):
        return True
    if not isinstance(operation.arguments, Write) or operation.arguments.if_version is not None:
        return False
    actions = [mutation.action for mutation in operation.arguments.mutations]
    return actions in (["put"], ["delete"]) and operation.result in (Done(), Unknown())
