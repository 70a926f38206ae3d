"""What the commands share: options, output, progress, errors, and the way to the cluster.

Rules of all commands: results go to stdout, everything else to stderr; with `--json` stdout holds one JSON object;
an error is one line; the exit status is 0 only on success (1: it failed, 2: the call is wrong, 130: Ctrl-C).
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click

from ..actors.ray_session import DATA_DIR_VARIABLE, connect_ray, default_data_dir
from ..cluster.errors import TimeTierError

if TYPE_CHECKING:
    from ..cluster.client.faces import Store

F = TypeVar("F", bound=Callable[..., Any])

NAMESPACE = "timetier"
_LINE_EVERY_S = 5.0
_LONGEST_ERROR_CHARS = 1_500

data_dir_option = click.option(
    "--data-dir",
    type=click.Path(file_okay=False, resolve_path=True, path_type=Path),
    envvar=DATA_DIR_VARIABLE,
    help=f"Data folder of the local cluster.  [default: ${DATA_DIR_VARIABLE} or ~/.timetier]",
)
address_option = click.option(
    "--address", envvar="RAY_ADDRESS", help="Address of a Ray cluster, as in ray.init.  [default: $RAY_ADDRESS]"
)
namespace_option = click.option(
    "--namespace", envvar="TIMETIER_NAMESPACE", help=f"Ray namespace of the cluster.  [default: {NAMESPACE}]"
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
table_option = click.option("--table", required=True, envvar="TIMETIER_TABLE", help="Name of the table.")


def timeout_option(what: str) -> Callable[[F], F]:
    """The option that says how long a command waits. `what`: it waits for, in words."""
    return click.option(
        "--timeout",
        "timeout_s",
        type=click.FloatRange(min=1.0),
        default=120.0,
        show_default=True,
        help=f"Seconds to wait for {what}.",
    )


def cluster_options(command: F) -> F:
    """Options that say which cluster is meant, and `--json`."""
    for option in (json_option, namespace_option, address_option, data_dir_option):
        command = option(command)
    return command


def enter(data_dir: Path | None, address: str | None) -> None:
    """Connect this process to the cluster's Ray. Raises Unavailable.

    Ray puts the working directory of whoever starts an actor first on the path of its modules, so the command moves
    to the data folder first; paths that the user gave are absolute by then.
    """
    folder = data_dir or default_data_dir()
    if folder.is_dir():
        os.chdir(folder)
    keep_stdout_clean()
    connect_ray(address, data_dir=folder)


_results: TextIO | None = None  # where results go, once Ray's own prints have been turned away from there


def keep_stdout_clean() -> None:
    """Send to stderr what Ray prints from now on, such as the news of a killed worker: stdout is for results."""
    global _results
    if _results is None:
        _results, sys.stdout = sys.stdout, sys.stderr


def results() -> TextIO:
    """Where a command writes its result."""
    return _results or sys.stdout


@contextlib.contextmanager
def open_store(data_dir: Path | None, address: str | None, namespace: str | None) -> Iterator[Store]:
    """A store of the cluster that the options name. Raises Unavailable."""
    enter(data_dir, address)
    from .. import connect

    with connect(address, namespace=namespace or NAMESPACE) as store:
        yield store


def show(result: dict[str, Any], text: str, *, as_json: bool) -> None:
    """Print a result to stdout: as one JSON object, or as text."""
    click.echo(json.dumps(result, ensure_ascii=False) if as_json else text, file=results())


def note(text: str) -> None:
    """Say something beside the result, on stderr."""
    click.echo(text, err=True)


def value_fields(value: bytes) -> dict[str, str]:
    """`value` of an item for JSON, or `value_base64` where it is no UTF-8."""
    try:
        return {"value": value.decode()}
    except UnicodeDecodeError:
        return {"value_base64": base64.b64encode(value).decode()}


def bytes_text(value: bytes) -> str:
    """Bytes for a terminal: text, or base64 where it is no UTF-8."""
    return next(iter(value_fields(value).values()))


def one_line(text: str) -> str:
    """Text with everything escaped that would break a line or a column, or act on a terminal."""
    return "".join(c if c.isprintable() and c != "\\" else c.encode("unicode_escape").decode() for c in text)


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_ERROR_CHARS else text[: _LONGEST_ERROR_CHARS - 3] + "..."


def table_of(headings: list[str], rows: list[list[str]]) -> str:
    """A plain table in columns."""
    lines = [headings, *rows]
    widths = [max(len(line[at]) for line in lines) for at in range(len(headings))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


@contextlib.contextmanager
def progress(label: str) -> Iterator[Callable[[int, int | None], None]]:
    """Shows progress on stderr: a bar on a terminal, else a line from time to time.

    Gives a function to be called with what is done and how much there is (None: not known yet).
    """
    if sys.stderr.isatty():
        with click.progressbar(length=1, label=label, file=sys.stderr, show_pos=True) as bar:

            def draw(done: int, total: int | None) -> None:
                bar.length = max(total or done, 1)
                bar.update(done - bar.pos)

            yield draw
        return
    told_at = time.monotonic()

    def tell(done: int, total: int | None) -> None:
        nonlocal told_at
        if time.monotonic() - told_at >= _LINE_EVERY_S:
            told_at = time.monotonic()
            note(f"{label}: {done:,}" + (f" of {total:,}" if total else ""))

    yield tell


def run_command(command: click.Command, arguments: list[str] | None) -> int:
    """Run a command; its exit status. Errors are told in one line on stderr."""
    try:
        return _run_command(command, arguments)
    finally:
        global _results
        if _results is not None:
            sys.stdout, _results = _results, None


def _check_text(arguments: list[str]) -> None:
    """Raises UsageError for bytes that are no UTF-8: Ray takes no command line that holds some."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise click.UsageError(
                f"the argument {argument!a} is no UTF-8: give a value by --file, owners and ids by the library"
            ) from None


def _run_command(command: click.Command, arguments: list[str] | None) -> int:
    try:
        _check_text(sys.argv[1:] if arguments is None else arguments)
        result = command.main(args=arguments, prog_name="timetier", standalone_mode=False)
        results().flush()
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        note("timetier: interrupted")
        return 130
    except TimeTierError as error:
        note(f"timetier: {type(error).__name__}: {_short(one_line(error.message))}")
        return 1
    except BrokenPipeError:
        # Who reads the output has gone, as `head` does; what is left in the buffer must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), results().fileno())
        return 1
    except Exception as error:
        if os.environ.get("TIMETIER_DEBUG"):
            raise
        told = one_line(str(error).strip()) or "no further text"
        if isinstance(error, OSError) and error.filename and error.strerror:
            told = one_line(f"{os.fsdecode(error.filename)}: {error.strerror}")
        told = _short(told)
        note(f"timetier: {type(error).__name__}: {told} (TIMETIER_DEBUG=1 shows where)")
        return 1
    return result if isinstance(result, int) else 0
