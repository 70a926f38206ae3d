"""Bugs of the sink that the simulation must find (see `planted.py`)."""

from __future__ import annotations

from .planting import Bug, Edit


def _bug(name: str, rule: str, *changes: tuple[str, str, str]) -> Bug:
    return Bug(name, rule, tuple(Edit(*change) for change in changes), plans="sinks")


SINK_BUGS = [
    _bug(
        "late write ignored by the sink",
        "the next generation of a block has the newest row of each item",
        ("cold.merging:_newest", "if held is None or row[3] >= held[3]:", "if held is None:"),
    ),
    _bug(
        "linked before all copies",
        "a link is written when all cold nodes have the file",
        ("cold.filing:Filing._copy", "for node in nodes:", "for node in nodes[:-1]:"),
    ),
    _bug(
        "two sinks at once",
        "the links of a bucket are written on condition that nobody else did",
        ("cold.filing:Filing._link", "if_version=pending.system_version,", ""),
    ),
    _bug(
        "epoch taken by two runs",
        "a run takes its epoch on condition that nobody else did",
        ("cold.run_record:Epoch._put", ", if_version=version", ""),
    ),
    _bug(
        "cold node hears a stale run",
        "a cold node takes no file of a run when it has heard of a later one",
        ("cold.fencing:EpochFence._admit", "if epoch < known:", "if False:"),
    ),
    _bug(
        "file removed within its grace",
        "a file stays for a while after its last block was replaced",
        ("cold.garbage:Garbage._remove_dead", "and file.dead_us <= latest_us", ""),
    ),
    _bug(
        "grace counted from the note",
        "the time of grace begins when no link names the file any more, not when that is planned",
        (
            "cold.garbage:Garbage._settle",
            "dead_us = self._run.time_us()",
            "dead_us = file.noted_us",
        ),
    ),
    _bug(
        "garbage removed though named",
        "a file goes only when no link names it",
        ("cold.garbage:_is_empty", "return file is not None and not file.live_bytes", "return file is not None"),
    ),
    _bug(
        "orphan removed without a fence",
        "links that may still arrive are fenced before a file is taken for garbage",
        (
            "cold.file_facts:_fence",
            "outcomes = yield from write(run.view, requests, run.settings.write_timeout_s)",
            "outcomes = [1] * len(requests)",
        ),
    ),
    _bug(
        "crashed run forgotten",
        "the files of a run that did not end are looked for",
        ("cold.run_record:RunRecord.following", "if self.state != CLEAN:", "if False:"),
    ),
    _bug(
        "replaced file not noted",
        "a file that loses its blocks is noted before it does",
        (
            "cold.filing:Filing.add_window",
            "pending.replaced.update(block.file for block in window.old.blocks)",
            "pass",
        ),
    ),
    _bug(
        "wiped rows carried along",
        "a rewrite leaves out what was wiped, of whatever owner",
        ("cold.merging:merge_window", "wiped.get(owner, 0), floor)", "0, floor)"),
    ),
    _bug(
        "rewritten file loses rows",
        "a rewrite keeps each row that is alive",
        ("cold.sink_script:_Run._old_rows", "found.append(decoded.all_rows())", "found[:] = [decoded.all_rows()]"),
    ),
]
