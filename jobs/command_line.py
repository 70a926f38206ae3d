"""The command line: `timetier COMMAND`. Rules of all commands are in `cli_common.py`."""

from __future__ import annotations

import signal
import sys
from types import FrameType

import click

from .. import __version__
from .cli_backup import backup, restore
from .cli_bench import bench
from .cli_cluster import down, map_command, status, up
from .cli_common import run_command
from .cli_data import delete, get, load, put, timeline
from .cli_demo import demo
from .cli_disk import disk
from .cli_explain import explain
from .cli_scale import scale
from .cli_scrub import scrub
from .cli_sink import sink
from .cli_tiers import tiers
from .cli_verify import repair, verify


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="timetier")
def commands() -> None:
    """A strongly consistent, tiered store for timelines, at home in a Ray cluster.

    Start with `timetier up`. Commands find the cluster by --address or RAY_ADDRESS, or else the local one of the
    data folder.
    """


_CLUSTER = (up, down, status, scale, sink, verify, repair, disk, scrub, map_command, backup, restore)
_DATA = (load, get, put, timeline, delete)
_LOOKING = (explain, tiers)
for command in (*_CLUSTER, *_DATA, *_LOOKING, demo, bench):
    commands.add_command(command)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: run one command and exit with its status."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _end)  # or else what a command has started would stay
    sys.exit(run_command(commands, arguments))


def _end(number: int, frame: FrameType | None) -> None:
    """End with everything tidied up, as Ctrl-C does."""
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
