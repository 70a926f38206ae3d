"""Chaos: real processes, real faults, and a history that must be linearizable.

    python -m tests.chaos --seconds 180 --seed 1       (from the root of the repository)

What goes on is told on stderr. The last line of stdout is the report, one JSON object; the exit status is 1 if it
tells of a violation, an acknowledged write that is missing, or a timeline that the checker gave up.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import click

from .faults import stop_signals
from .plan import KINDS
from .run import Options, run


@click.command(help=__doc__)
@click.option("--seconds", default=180.0, type=click.FloatRange(5, 86_400), show_default=True)
@click.option("--seed", type=int, help="What the plan of faults is made from.  [default: by chance, and told]")
@click.option("--only", multiple=True, metavar="FAULT", help="Only this kind of fault; may be given several times.")
@click.option("--per-second", default=75.0, type=click.FloatRange(3, 10_000), show_default=True, help="Operations.")
@click.option("--folder", type=click.Path(path_type=Path), help="Keep histories, logs and data in this folder.")
@click.option("--no-sink", is_flag=True, help="Run no sinks besides.")
@click.option("--list", "as_list", is_flag=True, help="List the kinds of faults.")
def main(
    seconds: float,
    seed: int | None,
    only: tuple[str, ...],
    per_second: float,
    folder: Path | None,
    no_sink: bool,
    as_list: bool,
) -> None:
    if as_list:
        for kind in KINDS.values():
            click.echo(f"{kind.name:16} {kind.what}")
        return
    unknown = [name for name in only if name not in KINDS]
    if unknown:
        raise click.BadParameter(f"no fault is called {unknown[0]!r}: --list shows them", param_hint="--only")
    stop_signals()
    # Ray prints what it has to say of dead nodes: that goes to stderr, and the report alone to stdout.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    chosen = random.randrange(1 << 32) if seed is None else seed
    options = Options(seconds, chosen, only, per_second, folder=folder, sinks=not no_sink)
    try:
        report = run(options)
    except KeyboardInterrupt:
        click.echo("interrupted: everything that was started has been ended", err=True)
        sys.exit(130)
    print(json.dumps(report), file=out, flush=True)
    sys.exit(0 if report["ok"] else 1)


if __name__ == "__main__":
    main()
