"""What a crash of the sink leaves, and what the next run makes of it: step x accident -> state.

    python -m tests.crash_matrix               # a table: every step of a run, five accidents; then real processes
    python -m tests.crash_matrix --json        # one JSON object
    python -m tests.crash_matrix --scripted    # without processes; --killed: only processes

Accidents: the run `ended` there; its last messages arrive `late`, after the next run, or in the `midst` of it; it was
`paused` and goes on after the next run; it goes on `beside` another one. `left`: files without a link right after that.
`removed`: files that the next run removed, of which `orphans` were never linked. Exit status 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    """Print the matrix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--scripted", action="store_true", help="only ends of the script, no processes")
    parser.add_argument("--killed", action="store_true", help="only processes that are killed")
    options = parser.parse_args()
    folder = str(Path(__file__).resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # the helpers of tests lie here
    from crash_kills import kill_matrix
    from crash_steps import crash_matrix

    if not options.json:
        print(f"{'step':<34} {'accident':<8} {'left':>4} {'removed':>7} {'orphans':>7} {'rows':>4}  after the next run")
    found: dict[str, list[dict[str, Any]]] = {"steps": [], "killed": []}
    for row in crash_matrix() if not options.killed else ():
        found["steps"].append(row.to_dict())
        if not options.json:
            _tell(f"{row.step:>3} {row.what}", row.accident, str(row.left), row.to_dict(), row.fenced)
    for kill in kill_matrix() if not options.scripted else ():
        found["killed"].append(kill.to_dict())
        if not options.json:
            _tell(f"SIGKILL {kill.what}", kill.when, "", kill.to_dict(), "" if kill.killed else "was not killed")
    wrong = sum(bool(row["wrong"]) for rows in found.values() for row in rows)
    if options.json:
        print(json.dumps({**found, "wrong": wrong}))
    else:
        print(f"{sum(map(len, found.values()))} accidents, {wrong} with anything wrong")
    return 1 if wrong else 0


def _tell(what: str, accident: str, left: str, row: dict[str, Any], note: str) -> None:
    state = row["wrong"] or "everything readable, nothing left over"
    figures = f"{left:>4} {row['removed']:>7} {row['orphans']:>7} {row['rows']:>4}"
    print(f"{what:<34} {accident:<8} {figures}  {state}{f' ({note})' if note else ''}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
