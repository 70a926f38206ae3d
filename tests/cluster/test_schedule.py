"""When the sink is due."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from timetier.cluster.config import Config, load_config
from timetier.cluster.errors import ConfigError
from timetier.cluster.schedule import LATE_S, Schedule


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


def test_an_interval_counts_from_the_start_of_the_last_run_and_a_missed_run_is_made_up_for_at_once() -> None:
    schedule = Schedule(every_s=3_600.0)
    assert schedule.next_after(1_000.0, None) == 4_600.0
    assert schedule.next_after(2_000.0, 1_000.0) == 4_600.0
    assert schedule.next_after(9_000.0, 1_000.0) <= 9_000.0


def test_a_cron_expression_is_due_at_its_times() -> None:
    schedule = Schedule(cron="30 3 * * 1-5")
    friday = at("2026-11-20T12:00:00")
    assert schedule.next_after(friday, None) == at("2026-11-23T03:30:00")
    assert schedule.next_after(friday, at("2026-11-20T03:30:00.5")) == at("2026-11-23T03:30:00")


def test_a_time_that_was_missed_by_little_is_made_up_for_and_one_that_was_missed_by_much_waits() -> None:
    schedule = Schedule(cron="30 3 * * *")
    last = at("2026-11-22T03:30:01")
    due = at("2026-11-23T03:30:00")
    assert schedule.next_after(due + LATE_S - 1, last) == due
    assert schedule.next_after(due + LATE_S + 1, last) == due + 86_400


def test_a_time_zone_moves_the_hour_also_over_the_change_to_winter_time() -> None:
    schedule = Schedule(cron="0 3 * * *", zone="Europe/Berlin")
    assert schedule.next_after(at("2026-07-01T00:00:00"), None) == at("2026-07-01T01:00:00")
    assert schedule.next_after(at("2026-12-01T00:00:00"), None) == at("2026-12-01T02:00:00")
    saturday = schedule.next_after(at("2026-10-24T00:00:00"), None)
    assert schedule.next_after(saturday, saturday) - saturday == 25 * 3_600


def test_a_run_that_has_not_begun_for_long_is_overdue() -> None:
    interval = Schedule(every_s=3_600.0)
    assert not interval.is_overdue(1e9, None), "before the first one nobody can tell"
    assert not interval.is_overdue(1e9 + 7_200, 1e9)
    assert interval.is_overdue(1e9 + 7_200 + LATE_S + 1, 1e9)
    daily = Schedule(cron="30 3 * * *")
    last = at("2026-11-22T03:30:00")
    assert not daily.is_overdue(at("2026-11-23T03:30:30"), last)
    assert daily.is_overdue(at("2026-11-23T04:00:00"), last)


def test_a_schedule_says_what_it_is() -> None:
    texts = [str(Schedule(every_s=seconds)) for seconds in (86_400.0, 5_400.0, 1.5)]
    assert texts == ["every 1d", "every 90m", "every 1.5s"]
    assert str(Schedule(cron="0 3 * * *", zone="Europe/Berlin")) == "cron 0 3 * * * (Europe/Berlin)"


def configured(tmp_path: Path, sink: str) -> Config:
    path = tmp_path / "c.yaml"
    path.write_text(f"data_dir: {tmp_path}\nsink:\n{sink}\ntables: {{}}\n")
    return load_config(path)


def test_the_configuration_gives_the_schedule(tmp_path: Path) -> None:
    assert configured(tmp_path, "  file_mb: 64").sink.schedule() is None
    assert str(configured(tmp_path, "  every: 24h").sink.schedule()) == "every 1d"
    daily = configured(tmp_path, '  cron: "0 3 * * *"\n  time_zone: Asia/Tokyo').sink.schedule()
    assert str(daily) == "cron 0 3 * * * (Asia/Tokyo)"


@pytest.mark.parametrize(
    ("sink", "words"),
    [
        ("  cron: 3 o'clock", "30 3 * * *"),
        ('  cron: "0 3 30 2 *"', "ever comes"),
        ('  cron: "0 3 * * * * *"', "cron expression"),
        ('  cron: "0 3 * * *"\n  every: 1h', "one of them"),
        ('  cron: "0 3 * * *"\n  time_zone: Berlin', "Europe/Berlin"),
    ],
)
def test_a_wrong_schedule_is_told_with_what_to_write(tmp_path: Path, sink: str, words: str) -> None:
    with pytest.raises(ConfigError, match="sink") as error:
        configured(tmp_path, sink)
    assert words in str(error.value)
