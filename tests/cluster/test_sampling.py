"""Totals from a sample of buckets are as exact as is said of them."""

from __future__ import annotations

import math
from random import Random

from timetier.cluster.sampling import needed_sample, relative_error, sample_order


def test_the_order_is_a_permutation_that_stays_the_same_and_favours_no_part() -> None:
    order = sample_order(1_024)
    assert sorted(order) == list(range(1_024))
    assert order == sample_order(1_024)
    low = sum(bucket < 512 for bucket in order[:256])
    assert 90 < low < 166


def test_the_true_total_lies_within_the_stated_error_in_about_95_of_100_cases() -> None:
    random = Random(11)
    within = 0
    for _ in range(400):
        population = [int(random.expovariate(1 / 1_000)) for _ in range(1_024)]
        found = random.sample(population, 128)
        error = relative_error(found, len(population))
        estimate = sum(found) * len(population) / len(found)
        within += abs(estimate - sum(population)) <= error * estimate
    assert 360 <= within <= 398


def test_the_sample_that_is_said_to_be_needed_brings_the_error_that_was_wanted() -> None:
    random = Random(12)
    population = [int(random.expovariate(1 / 1_000)) for _ in range(4_096)]
    found = population[:64]
    count = needed_sample(found, len(population), 0.05)
    assert 64 < count < len(population)
    assert relative_error(population[:count], len(population)) < 0.07


def test_edges_all_buckets_no_data_one_bucket() -> None:
    assert relative_error([1, 2, 3], 3) == 0
    assert relative_error([0, 0], 64) == 0
    assert math.isinf(relative_error([5], 64))
    assert needed_sample([5], 64, 0.1) == 64
    assert needed_sample([5] * 10, 64, 0.1) == 10
    assert needed_sample([0, 0, 0, 9] * 4, 64, 1e-9) == 64
