"""The static map keeps G1 and G2 at every number of groups, and nobody serves from a damaged copy of it."""

from __future__ import annotations

import bisect
import random
from pathlib import Path

import numpy as np
import pytest
import xxhash
from timetier.cluster import static_map
from timetier.cluster.errors import Corrupt, InvalidRequest
from timetier.cluster.static_map import MAX_BUCKETS, SHIPPED_BUCKETS, SHIPPED_FILE, StaticMap, max_groups
from timetier.cluster.static_map.build import build

SMALLER = [1 << k for k in range(15)]
GROUPS_OF = {
    1: 1,
    64: 1,
    128: 2,
    1_024: 20,
    16_384: 327,
    32_768: 655,
    65_536: 1_000,
    131_072: 1_000,
    MAX_BUCKETS: 1_000,
}


def steps_of(encoded: bytes) -> list[list[int]]:
    """Buckets of each step 2, 3, ... by a plain reading of the file format."""
    body = encoded[static_map._BODY_AT :]
    buckets = int.from_bytes(encoded[12:16], "little")
    groups = int.from_bytes(encoded[16:20], "little")
    at = 0
    steps = []
    for groups_then in range(2, groups + 1):
        step: list[int] = []
        last = -1
        for _ in range(buckets // groups_then):
            value = shift = 0
            while body[at] >= 0x80:
                value |= (body[at] & 0x7F) << shift
                shift += 7
                at += 1
            value |= body[at] << shift
            at += 1
            last += value + 1
            step.append(last)
        steps.append(step)
    assert at == len(body)
    return steps


def check_every_step(static: StaticMap) -> None:
    before = static.owners(1)
    assert not before.any()
    for groups in range(2, static.max_groups + 1):
        owners = static.owners(groups)
        assert owners.shape == (static.buckets,)
        shares = np.bincount(owners)
        assert len(shares) == groups
        assert shares.max() - shares.min() <= 1, groups
        assert (shares.max() - shares.min()) / shares.mean() <= 0.02, groups
        moved = owners != before
        assert (owners[moved] == groups - 1).all(), groups
        assert moved.sum() == static.buckets // groups
        before = owners


def test_shipped_shares_differ_by_one_bucket_and_steps_move_buckets_to_the_added_group_only() -> None:
    check_every_step(StaticMap.load(SHIPPED_BUCKETS))


@pytest.mark.parametrize("buckets", SMALLER)
def test_smaller_maps_keep_the_same_promises_at_every_step(buckets: int) -> None:
    check_every_step(StaticMap.load(buckets))


def test_growth_from_any_number_of_groups_to_any_other_moves_only_the_share_of_the_added_groups() -> None:
    static = StaticMap.load(SHIPPED_BUCKETS)
    seed = 20260101
    print(f"seed {seed}")
    chance = random.Random(seed)
    for _ in range(300):
        few, many = sorted(chance.sample(range(1, static.max_groups + 1), 2))
        before, after = static.owners(few), static.owners(many)
        moved = before != after
        assert (after[moved] >= few).all()
        assert abs(moved.sum() - static.buckets * (many - few) / many) <= many - few


def test_measure_reports_the_worst_of_all_steps_of_the_shipped_file() -> None:
    figures = StaticMap.load(SHIPPED_BUCKETS).measure()
    assert figures["buckets"] == SHIPPED_BUCKETS
    assert figures["groups"] == 1_000
    # One bucket more or less weighs most where the shares are smallest, and 131,072 is no multiple of 1,000.
    assert figures["worst_spread"] == pytest.approx(1_000 / SHIPPED_BUCKETS)
    assert figures["worst_excess_moved"] == 0.0
    assert figures["bytes"] == SHIPPED_FILE.stat().st_size < 1_500_000


def test_measure_sees_an_uneven_map_and_a_move_between_old_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    static = build(1_024)
    honest = static.owners

    def wrong(groups: int) -> np.ndarray:
        owners = honest(groups).copy()
        if groups == 7:
            owners[np.flatnonzero(owners == 2)[:50]] = 3
        return owners

    monkeypatch.setattr(static, "owners", wrong)
    figures = static.measure()
    shares = np.bincount(wrong(7))
    assert figures["worst_spread"] == pytest.approx((shares.max() - shares.min()) * 7 / 1_024)
    assert figures["worst_excess_moved"] >= 0.9 * 50 / 1_024


def test_look_up_equals_a_plain_replay_of_the_file() -> None:
    static = StaticMap.load(SHIPPED_BUCKETS)
    moves: list[list[int]] = [[1] for _ in range(SHIPPED_BUCKETS)]
    for step, listed in enumerate(steps_of(SHIPPED_FILE.read_bytes()), start=2):
        for bucket in listed:
            moves[bucket].append(step)
    for groups in (1, 2, 3, 4, 7, 10, 64, 333, 999, 1_000):
        owners = static.owners(groups)
        assert owners.dtype == np.uint16
        assert owners.tolist() == [steps[bisect.bisect_right(steps, groups) - 1] - 1 for steps in moves]


def test_neighbouring_buckets_do_not_move_together_more_often_than_by_chance() -> None:
    excess = 0.0
    expected = 0.0
    for step in steps_of(SHIPPED_FILE.read_bytes()):
        moved = np.asarray(step)
        pairs = int(np.count_nonzero(np.diff(moved) == 1))
        by_chance = len(moved) ** 2 / SHIPPED_BUCKETS
        assert abs(pairs - by_chance) < 6 * by_chance**0.5 + 6
        excess += pairs - by_chance
        expected += by_chance
    assert abs(excess) < 6 * expected**0.5


def test_the_generator_makes_the_shipped_file() -> None:
    assert build(SHIPPED_BUCKETS).to_bytes() == SHIPPED_FILE.read_bytes()


def test_maps_never_change_because_clusters_have_placed_their_data_by_them() -> None:
    assert StaticMap.load(131_072).checksum == "423e9f612ee528ab966eeffd864c30b5"
    assert StaticMap.load(1_024).checksum == "4be599bcfc7d8e500e2eda0d9e524c64"


@pytest.mark.parametrize("buckets", [1, 64, 1_024, SHIPPED_BUCKETS])
def test_a_map_kept_beside_the_data_gives_the_same_owners_when_read_back(buckets: int) -> None:
    static = StaticMap.load(buckets)
    again = StaticMap.from_bytes(static.to_bytes())
    assert again.to_bytes() == static.to_bytes()
    assert (again.buckets, again.max_groups, again.checksum) == (buckets, max_groups(buckets), static.checksum)
    for groups in {1, again.max_groups}:
        assert (again.owners(groups) == static.owners(groups)).all()


def test_every_flipped_bit_of_a_map_is_noticed() -> None:
    encoded = StaticMap.load(1_024).to_bytes()
    for bit in range(len(encoded) * 8):
        damaged = bytearray(encoded)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Corrupt, match=r"kept\.map: "):
            StaticMap.from_bytes(bytes(damaged), "kept.map")


def test_every_cut_and_any_addition_to_a_map_is_noticed() -> None:
    encoded = StaticMap.load(1_024).to_bytes()
    for length in range(len(encoded)):
        with pytest.raises(Corrupt):
            StaticMap.from_bytes(encoded[:length])
    with pytest.raises(Corrupt):
        StaticMap.from_bytes(encoded + b"\0")


def sealed(version: int, buckets: int, groups: int, body: bytes) -> bytes:
    """A file with this content, and the right checksum."""
    header = static_map._HEADER.pack(static_map._MAGIC, version, buckets, groups, len(body))
    return header + xxhash.xxh3_128_digest(header + body) + body


def test_a_map_made_by_another_writer_of_the_format_is_read() -> None:
    first_half = sealed(1, 128, 2, b"\x00" * 64)
    assert (StaticMap.from_bytes(first_half).owners(2) == (np.arange(128) < 64)).all()


@pytest.mark.parametrize("body", [b"", b"\xff" * 64, b"\x80" * 63 + b"\x00", b"\x7f" * 64, b"\x00" * 65])
def test_a_body_that_is_no_map_is_refused_even_with_a_right_checksum(body: bytes) -> None:
    with pytest.raises(Corrupt):
        StaticMap.from_bytes(sealed(1, 128, 2, body))


@pytest.mark.parametrize(("version", "buckets", "groups"), [(2, 128, 2), (1, 127, 2), (1, 128, 3), (1, 1 << 31, 1_000)])
def test_a_header_that_this_version_does_not_know_is_refused(version: int, buckets: int, groups: int) -> None:
    with pytest.raises(Corrupt):
        StaticMap.from_bytes(sealed(version, buckets, groups, b"\x00" * 64))


def test_a_missing_or_damaged_shipped_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "b131072.map"
    monkeypatch.setattr(static_map, "SHIPPED_FILE", file)
    load = static_map._load.__wrapped__  # without the maps that were loaded before
    with pytest.raises(Corrupt, match="install timetier again"):
        load(SHIPPED_BUCKETS)
    damaged = bytearray(SHIPPED_FILE.read_bytes())
    damaged[500_000] ^= 0x10
    file.write_bytes(damaged)
    with pytest.raises(Corrupt, match="checksum"):
        load(SHIPPED_BUCKETS)
    file.write_bytes(SHIPPED_FILE.read_bytes())
    assert load(SHIPPED_BUCKETS).checksum == StaticMap.load(SHIPPED_BUCKETS).checksum


@pytest.mark.parametrize("buckets", [-1, 0, 3, 1_000, 131_071, MAX_BUCKETS * 2])
def test_numbers_of_buckets_that_are_no_power_of_two_are_refused(buckets: int) -> None:
    for refuse in (StaticMap.load, max_groups, build):
        with pytest.raises(InvalidRequest, match="power of two"):
            refuse(buckets)


@pytest.mark.parametrize(("buckets", "groups"), GROUPS_OF.items())
def test_a_group_has_fifty_buckets_at_least_and_there_are_a_thousand_groups_at_most(buckets: int, groups: int) -> None:
    assert max_groups(buckets) == groups


@pytest.mark.parametrize("groups", [-1, 0, 21])
def test_more_groups_than_the_buckets_allow_are_refused(groups: int) -> None:
    with pytest.raises(InvalidRequest, match="1 to 20 groups"):
        StaticMap.load(1_024).owners(groups)


def test_nobody_can_change_the_owners_that_others_look_up() -> None:
    with pytest.raises(ValueError, match="read-only"):
        StaticMap.load(1_024).owners(3)[0] = 1
