"""Bugs of retention and of wiped timelines that the simulation must find (see `planted.py`)."""

from __future__ import annotations

from .planting import Bug, Edit


def _bug(name: str, rule: str, *changes: tuple[str, str, str], plans: str = "retention") -> Bug:
    return Bug(name, rule, tuple(Edit(*change) for change in changes), plans)


EXPIRY_BUGS = [
    _bug(
        "horizon of one replica",
        "a reader goes by the greatest horizon that any of a majority tells",
        ("memory.requests:_vote", "slot.horizon = max(slot.horizon, horizon)", "slot.horizon = slot.horizon"),
        (
            "memory.requests:take_checked",
            "slot.data = answers[first:end]",
            "slot.data = answers[first:end]; slot.horizon = answers[first].horizon",
        ),
    ),
    _bug(
        "horizon in doubt not told",
        "a replica that has accepted a horizon and does not know whether it was chosen is no vote",
        (
            "paxos.standings:Standings.in_doubt",
            "return record is not None and table in horizons_in(record.keys)",
            "return False",
        ),
    ),
    _bug(
        "page with expired items proven",
        "a page is current while a majority knows of no later horizon than when it was read",
        ("paxos.acceptor:Acceptor._write_entry", "self.core.versions.horizon_moved()", "pass"),
    ),
    _bug(
        "rows written below the horizon stay",
        "rows that are written below the horizon are freed too",
        ("paxos.expiry:Expiry.note", "if least and least < floor:", "if False:"),
    ),
    _bug(
        "expired rows freed without raising the floor",
        "the log is not asked for rows that have expired",
        (
            "paxos.expiry:Expiry._delete",
            "delete(self._core.timeline(key), doomed, max(map(version_of, doomed)))",
            "delete(self._core.timeline(key), doomed, 0)",
        ),
    ),
    _bug(
        "wiped timeline not noted",
        "a scan names a wiped timeline as long as blocks hold its rows",
        ("paxos.chores:Chores._note_wipe", "if wiped:", "if False:"),
        plans="sinks",
    ),
]
