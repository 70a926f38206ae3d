"""What `timetier tiers` prints: tables of figures by age, the two curves, costs; and the same for machines."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from ..cluster import in_words
from ..cluster.ages import BIN_NAMES
from ..cluster.config import PricesConfig
from ..cluster.tiering import Costs, Prices, Survey, TableTiers, costs_of, error_words
from ..cluster.topology import Topology
from .cli_common import one_line, table_of

_BAR_CHARS = 25


def survey_json(survey: Survey, prices: PricesConfig, shape: Topology) -> dict[str, Any]:
    """The survey as one JSON object: figures by age, curves as cumulative shares, costs a month."""
    return {
        "asked_at_us": survey.asked_at_us,
        "exact": survey.exact,
        "seconds": round(survey.seconds, 3),
        "ages": list(BIN_NAMES),
        "tables": [_table_json(tiers, prices, shape) for tiers in survey.tables],
        "costs": _costs_json(costs_of_survey(survey.tables, prices, shape)),
        "prices": prices.model_dump(),
        "storage_replicas": shape.storage_replicas,
        "cold_replicas": shape.cold_replicas,
        "silent": survey.silent,
    }


def _table_json(tiers: TableTiers, prices: PricesConfig, shape: Topology) -> dict[str, Any]:
    figures = asdict(tiers)
    for name in ("storage_error", "cold_error"):
        if not math.isfinite(figures[name]):
            figures[name] = None  # JSON has no word for it
    return {
        **figures,
        "data_up_to_age": [round(share, 6) for share in tiers.data_curve()],
        "reads_up_to_age": [round(share, 6) for share in tiers.read_curve()],
        "costs": _costs_json(costs_of_survey([tiers], prices, shape)),
    }


def costs_of_survey(tables: list[TableTiers], prices: PricesConfig, shape: Topology) -> Costs:
    """Costs a month with all copies."""
    each = Prices(prices.memory_gb_month, prices.storage_gb_month, prices.cold_gb_month)
    return costs_of(tables, each, storage_replicas=shape.storage_replicas, cold_replicas=shape.cold_replicas)


def _costs_json(costs: Costs) -> dict[str, float]:
    return {name: round(value, 6) for name, value in {**asdict(costs), "total": costs.total}.items()}


def survey_text(survey: Survey, prices: PricesConfig, shape: Topology) -> str:
    """The survey for people."""
    if not survey.tables:
        return "there is no data in any table"
    parts = [_table_text(tiers) for tiers in survey.tables]
    parts.append(_costs_text(survey, prices, shape))
    parts += [f"no answer from {node}: {one_line(reason)}" for node, reason in survey.silent.items()]
    return "\n\n".join(parts)


def _table_text(tiers: TableTiers) -> str:
    headings = ["age up to", "memory items", "bytes", "storage items", "bytes", "cold items", "raw", "encoded"]
    headings += ["reads/hour", "reads/day"]
    columns = (
        (tiers.memory_items, _count),
        (tiers.memory_bytes, in_words.size),
        (tiers.storage_items, _count),
        (tiers.storage_bytes, in_words.size),
        (tiers.cold_items, _count),
        (tiers.cold_raw_bytes, in_words.size),
        (tiers.cold_bytes, in_words.size),
        (tiers.reads_hour, _count),
        (tiers.reads_day, _count),
    )
    rows = [[name, *(say(figures[at]) for figures, say in columns)] for at, name in enumerate(BIN_NAMES)]
    rows.append(["all", *(say(sum(figures)) for figures, say in columns)])
    return f"table {tiers.table} ({error_words(tiers)})\n{table_of(headings, rows)}\n\n{_chart(tiers)}"


def _count(figure: float) -> str:
    return f"{figure:,}"


def _chart(tiers: TableTiers) -> str:
    """Data by age and reads by age, both as shares that add up from the youngest on."""
    rows = [
        [name, _bar(data), _bar(reads)]
        for name, data, reads in zip(BIN_NAMES, tiers.data_curve(), tiers.read_curve(), strict=True)
    ]
    if not sum(tiers.reads_day):
        rows = [[name, data, ""] for name, data, _ in rows]
    return table_of(["age up to", "share of the data", "share of the last day's reads"], rows)


def _bar(share: float) -> str:
    return f"{share:6.1%} " + "#" * round(share * _BAR_CHARS)


def _costs_text(survey: Survey, prices: PricesConfig, shape: Topology) -> str:
    costs = costs_of_survey(survey.tables, prices, shape)
    tables = survey.tables
    memory, storage, cold = (
        in_words.size(sum(map(sum, by_table)))
        for by_table in zip(*((t.memory_bytes, t.storage_bytes, t.cold_bytes) for t in tables), strict=True)
    )
    rows = [
        ["memory", memory, "as held", f"{prices.memory_gb_month:g}", f"{costs.memory:,.4g}"],
        ["storage", storage, str(shape.storage_replicas), f"{prices.storage_gb_month:g}", f"{costs.storage:,.4g}"],
        ["cold", cold, str(shape.cold_replicas), f"{prices.cold_gb_month:g}", f"{costs.cold:,.4g}"],
    ]
    rows.append(["all", "", "", "", f"{costs.total:,.4g}"])
    headings = ["tier", "one copy", "copies", f"{prices.currency}/GB/month", f"{prices.currency}/month"]
    return (
        f"{table_of(headings, rows)}\n"
        f"all of it in the storage tier: {costs.all_in_storage:,.4g} {prices.currency}/month; "
        f"in memory, once: {costs.all_in_memory:,.4g} {prices.currency}/month\n"
        "prices are those of `prices` in the configuration; the defaults are examples"
    )
