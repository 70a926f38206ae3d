"""Proof that pages in memory are current, against the model of replicas that `storage_model.py` has."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest
from read_answers import keys_of, travelled
from reader_bench import Bench, T
from storage_model import DEAD, PAUSED, UP, key_of
from timetier.cluster.keys import item_key
from timetier.cluster.memory import glances
from timetier.cluster.memory.columns import NO_PAGE, ItemGlance, PageGlance
from timetier.cluster.memory.page_cache import PageCache
from timetier.cluster.memory.pages import Page
from timetier.cluster.memory.proving import ProofLane, Told
from timetier.cluster.memory.requests import PageAnswer
from timetier.cluster.messages import AskSame, Same, pack_u32, unpack_i64

FEW, MANY = 1 << 30, 0


@pytest.fixture(params=[FEW, MANY], ids=["few", "many"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of asking, by lists and by arrays, keep every rule."""
    monkeypatch.setattr(glances, "_FEW", request.param)


def page_of(bench: Bench, timeline: bytes = T) -> Page:
    """The page that the reader keeps, after it was read."""
    bench.run(bench.page_read(5, timeline=timeline))
    page = bench.reader.cache.peek(timeline)
    assert page is not None
    return page


def unproven(bench: Bench, *pages: Page) -> list[int]:
    left: list[int] = bench.world.drive(bench.reader.prove(pages, 0))
    return left


def test_a_current_page_is_proven_by_one_question_to_each_of_two_replicas() -> None:
    bench = Bench()
    bench.world.put(T, 1)
    page = page_of(bench)
    bench.sent(AskSame)
    assert unproven(bench, page) == []
    first, second, _ = bench.order()
    assert sorted(bench.sent(AskSame)) == sorted([f"storage-0-{first}", f"storage-0-{second}"])


def test_a_page_is_not_proven_once_anything_was_chosen_or_accepted_after_it() -> None:
    bench = Bench()
    bench.world.put(T, 1)
    page = page_of(bench)
    bench.world.accept(bench.order()[1], T, 2, (7, (0, 1, 1)), [])
    assert unproven(bench, page) == [0], "somebody has accepted another entry, and a majority might"
    bench.world.accept(bench.order()[2], T, 2, (7, (0, 1, 1)), [])
    assert unproven(bench, page) == [0]
    page = page_of(bench)
    assert page.version == 2
    for number in range(3):
        bench.world.learn(number, T)
    assert unproven(bench, page) == []


@pytest.mark.parametrize("state", [DEAD, PAUSED])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_with_one_replica_away_pages_are_proven_by_the_two_others(position: int, state: str) -> None:
    bench = Bench()
    bench.world.put(T, 1)
    page_of(bench)
    bench.world.replicas[bench.order()[position]].state = state
    for _ in range(3):
        page = page_of(bench)  # at the latest then the reader knows, and has its page from one of the others
    assert unproven(bench, page) == []
    others = [number for number in bench.order() if number != bench.order()[position]]
    bench.world.replicas[others[0]].state = DEAD
    assert unproven(bench, page) == [0], "one replica proves nothing"


def test_a_page_with_items_that_have_expired_since_is_not_proven() -> None:
    bench = Bench()
    for timestamp in (1, 50):
        bench.world.put(T, timestamp)
    page = page_of(bench)
    bench.world.horizon = 20
    assert unproven(bench, page) == [0]
    page = page_of(bench)
    assert page.keys == [item_key(50)]
    assert unproven(bench, page) == []


@pytest.mark.parametrize("moved", [0, 1])
def test_a_page_is_not_proven_once_one_of_those_asked_has_accepted_a_later_horizon(moved: int) -> None:
    bench = Bench()
    for timestamp in (1, 50):
        bench.world.put(T, timestamp)
    page = page_of(bench)
    for replica in bench.world.replicas:
        replica.lags = True
    bench.world.horizon = 20
    assert unproven(bench, page) == [], "nobody has heard of it"
    bench.world.replicas[bench.order()[moved]].lags = False
    assert unproven(bench, page) == [0]
    page = page_of(bench)
    assert page.keys == [item_key(50)]
    assert unproven(bench, page) == []
    bench.world.replicas[bench.order()[1 - moved]].lags = False
    assert unproven(bench, page) == [0], "it can't be told from here that this is the same horizon"
    assert unproven(bench, page_of(bench)) == []


def test_a_page_that_other_replicas_confirm_is_proven_when_they_have_told_their_horizons_once() -> None:
    bench = Bench()
    bench.world.put(T, 1)
    page = page_of(bench)
    first, second, third = bench.order()
    bench.world.replicas[first].state = DEAD
    assert unproven(bench, page) == [0]
    page = page_of(bench)
    assert unproven(bench, page) == []
    bench.world.replicas[first].state, bench.world.replicas[second].state = UP, DEAD
    for _ in range(4):
        page = page_of(bench)
    assert unproven(bench, page) == [], "the marks of all that have ever told are kept"
    assert bench.world.replicas[third].state == UP


@pytest.mark.parametrize(
    "spoil",
    [
        lambda same: Same(b"\x01", same.mark),
        lambda same: Same(pack_u32([5]), same.mark),
        lambda same: Same(same.others, same.mark + 7),
    ],
    ids=["half a column", "no such question", "another mark"],
)
def test_an_answer_that_does_not_fit_proves_nothing(spoil: Callable[[Same], Same]) -> None:
    bench = Bench()
    bench.world.put(T, 1)
    page = page_of(bench)
    answer = bench.world.answer
    bench.world.answer = lambda replica, message: (  # type: ignore[method-assign]
        spoil(answer(replica, message)) if isinstance(message, AskSame) else answer(replica, message)  # type: ignore[arg-type]
    )
    assert unproven(bench, page) == [0]


@pytest.mark.parametrize("seed", range(60))
def test_what_is_proven_is_the_truth_whatever_replicas_accept_learn_or_lose_meanwhile(seed: int) -> None:
    print(f"seed {seed}")
    bench = Bench(seed)
    world = bench.world
    timelines = [key_of(f"owner{n}") for n in range(4)]
    for timeline in timelines:
        world.log(timeline)
    world.truth.pop(T)
    world.noisy = True
    proven = 0
    for _ in range(60):
        for _ in range(random.Random(seed).choice((0, 2, 10))):
            world.noise()
        if world.random.random() < 0.5:
            bench.run(*[bench.page_read(20, timeline=timeline) for timeline in timelines])
        pages = {timeline: bench.reader.cache.peek(timeline) for timeline in timelines}
        known = {timeline: page for timeline, page in pages.items() if page is not None}
        chosen = {timeline: len(world.log(timeline)) for timeline in timelines}
        left = unproven(bench, *known.values()) if known else []
        for place, (timeline, page) in enumerate(known.items()):
            if place not in left:
                proven += 1
                assert page.version >= chosen[timeline], "an entry was chosen before the question"
                items = world.items(timeline, page.version)
                truth = {key: item for key, item in items.items() if page.contains(key)}
                assert {
                    key: (it.value, it.version) for key, it in zip(page.keys, page.unpacked(), strict=True)
                } == truth
    assert proven, "nothing was ever proven: this shows nothing"


def test_a_replaced_incarnation_proves_nothing() -> None:
    bench = Bench()
    bench.world.put(T, 1)
    page = page_of(bench)
    answer = bench.world.answer
    seen = {number: [1, 1, 1] for number in range(3)}

    def telling(replica: object, message: object) -> object:
        found = answer(replica, message)  # type: ignore[arg-type]
        if isinstance(found, Same):
            found.incarnations = seen[replica.number]  # type: ignore[attr-defined]
        return found

    bench.world.answer = telling  # type: ignore[assignment, method-assign]
    assert unproven(bench, page) == []
    first, second, _ = bench.order()
    seen[second][first] = 2
    assert unproven(bench, page) == [0], "the second has heard that the first lost its data, and was replaced"


# ---------------------------------------------------------------- columns


def test_reads_that_no_page_covers_are_left_over() -> None:
    cache = PageCache(1 << 20)
    bench = Bench()
    for timestamp in range(20):
        bench.world.put(T, timestamp)
    page = page_of(bench)
    cache.put(T, page)
    assert page.low > item_key(3)
    other = key_of("bob")
    items = ItemGlance(cache, [T, other, T, T, T], [item_key(n) for n in (19, 19, 3, 99, 18)])
    assert (items.rest, items.covered()) == ([1, 2], [page])
    assert items.pages == [page, NO_PAGE, NO_PAGE, page, page]
    found = travelled(items.answer(bytearray(5), {}))
    assert [item and item.value for item in found.items] == [b"v", None, None, None, b"v"]
    assert unpack_i64(found.timeline_versions) == [20, -1, -1, 20, 20]
    assert items.drop([page]) == 3
    assert sorted(items.rest) == [0, 1, 2, 3, 4] and items.places == [-1] * 5
    pages = PageGlance(cache, [T, T, T], [b"", b"", item_key(3)], [2, 100, 1])
    assert pages.rest == [1, 2]
    answer = travelled(pages.answer(bytearray(3), {}, 1 << 20))
    assert [keys_of(items) for items in answer.items] == [[item_key(18), item_key(19)], [], []]
    assert answer.more == b"\x01\x00\x00"


def test_an_answer_of_pages_is_cut_where_it_exceeds_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timetier.cluster.memory.columns.MAX_ANSWER_BYTES", 50)
    cache = PageCache(1 << 20)
    bench = Bench()
    bench.world.put(T, 1, b"x" * 12)
    cache.put(T, page_of(bench))
    pages = travelled(PageGlance(cache, [T] * 3, [b""] * 3, [1] * 3).answer(bytearray(3), {}, 1 << 20))
    assert pages.outcomes[:2] == b"\x00\x00" and pages.outcomes[2] != 0 and [len(p) for p in pages.items] == [1, 1, 0]
    items = travelled(ItemGlance(cache, [T] * 3, [item_key(1)] * 3).answer(bytearray(3), {}))
    assert items.outcomes[:2] == b"\x00\x00" and items.outcomes[2] != 0 and items.items[2] is None


# ---------------------------------------------------------------- the lane


class Proofs:
    """Proofs that a test ends by hand, and what the lane told of each."""

    def __init__(self, *, stall_s: float) -> None:
        self.asked: list[tuple[list[Page], Told]] = []
        self.told: dict[str, list[Page]] = {}
        self.given_up = 0
        self.began = asyncio.Event()
        self.lane = ProofLane(self._prove, parallel=1, batch_pages=100, max_batches=4, stall_s=stall_s)

    def _prove(self, pages: list[Page], tell: Told) -> Proofs:
        self.asked.append((pages, tell))
        self.began.set()
        return self

    def cancel(self) -> None:
        self.given_up += 1

    def prove(self, name: str, pages: list[Page]) -> None:
        self.lane.prove(pages, lambda unproven: self.told.__setitem__(name, list(unproven)))


def test_pages_that_come_while_a_proof_is_under_way_share_the_next_and_none_that_was_asked_before() -> None:
    async def main() -> None:
        proofs = Proofs(stall_s=5.0)
        good, bad = (page_of(Bench(seed)) for seed in (1, 2))
        proofs.prove("first", [good])
        for name in "abcde":
            proofs.prove(name, [good, bad])
        assert [pages for pages, _ in proofs.asked] == [[good]]
        proofs.asked[0][1]([])
        assert proofs.told == {"first": []}
        assert [pages for pages, _ in proofs.asked] == [[good], [good, bad]]
        proofs.asked[1][1]([bad])
        assert proofs.told == {"first": [], **{name: [bad] for name in "abcde"}}
        proofs.lane.stop()
        proofs.prove("late", [good])
        assert proofs.told["late"] == [good], "who has stopped proves nothing"

    asyncio.run(main())


def test_a_proof_that_takes_long_holds_up_the_next_one_only_for_a_while() -> None:
    async def main() -> None:
        proofs = Proofs(stall_s=0.01)
        slow, fast = (page_of(Bench(seed)) for seed in (1, 2))
        proofs.prove("slow", [slow])
        proofs.began.clear()
        proofs.prove("fast", [fast])
        assert len(proofs.asked) == 1
        async with asyncio.timeout(5):
            await proofs.began.wait()
        proofs.asked[1][1]([])
        assert proofs.told == {"fast": []}
        proofs.prove("queued", [fast])
        proofs.lane.stop()
        assert proofs.told == {"fast": [], "slow": [slow], "queued": [fast]}, "what was given up has proven nothing"
        assert proofs.given_up == len(proofs.asked) - 1

    asyncio.run(main())


def test_a_page_answer_is_what_the_long_way_gives() -> None:
    bench = Bench()
    for timestamp in range(9):
        bench.world.put(T, timestamp)
    page = page_of(bench)
    bench.reader.cache.put(T, page)
    read = bench.page_read(4)
    bench.run(read)
    assert isinstance(read.answer, PageAnswer)
    long_way = PageGlance(PageCache(0), [T], [b""], [4])
    covered = PageGlance(bench.reader.cache, [T], [b""], [4])
    assert covered.answer(bytearray(1), {}, 1 << 20) == long_way.answer(bytearray(1), {0: read}, 1 << 20)
