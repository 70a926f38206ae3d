"""Runs the examples of `docs/cold-data.md`, which are doctests within a page."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

from timetier.cluster.client.faces import Table

PAGE = Path(__file__).parents[1] / "docs" / "cold-data.md"
MINUTE_US = 60_000_000


def fill(moments: Table) -> int:
    """Write the items that the page speaks of; how many."""
    for owner in ("alice", "bob", "carol"):
        moments.put_many([(owner, at * MINUTE_US, b"%02d" % at) for at in range(100)])
    return 300


def examples(*, ray: bool) -> str:
    """The code of the page, that for Ray or the other."""
    blocks = re.findall(r"(<!-- with Ray -->\n)?```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    found = [code for mark, code in blocks if bool(mark) == ray]
    assert found, "the page has no such examples"
    return "\n".join(found)


def run_examples(code: str, **names: object) -> None:
    """Fails with the first line that gives something else than the page says."""
    test = doctest.DocTestParser().get_doctest(code, dict(names), PAGE.name, str(PAGE), 0)
    assert test.examples
    words: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    runner.run(test, out=words.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(words)
