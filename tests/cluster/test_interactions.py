"""Every interaction script of `testdata/` does what it says.

A script is commands with their expected output (see `interaction.py`). After a change that is meant to change
outputs, have them written anew and read the difference as you would read code:

    TIMETIER_REWRITE=1 pytest tests/cluster/test_interactions.py && git diff tests/cluster/testdata
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import interaction
import pytest
from interaction import Interpreter
from interaction_command import ScriptError

SCRIPTS = sorted((Path(__file__).parent / "testdata").glob("*.txt"))
GUIDE = Path(__file__).parents[2] / "docs" / "protocol-by-example.md"
REWRITE = os.environ.get("TIMETIER_REWRITE") == "1"


def play(text: str) -> str:
    """A script with its outputs as they come out. Raises ScriptError when it can't be carried out."""
    interpreter = Interpreter()
    played: list[str] = []
    commands: list[str] = []
    in_output = False
    for line in [*text.splitlines(), ""]:
        if in_output:
            in_output = bool(line)
            if line:
                continue
        if line == "----":
            answers = [answer for answer in map(interpreter.run, commands) if answer]
            played += [line, *(answers or ["ok"])]
            commands, in_output = [], True
            continue
        if line and not line.startswith("#"):
            commands.append(line)
        elif commands:
            raise ScriptError(f"{commands} are not followed by a line ----")
        played.append(line)
    return "\n".join(played[:-1]) + "\n"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_the_script_does_what_it_says(path: Path) -> None:
    text = path.read_text()
    played = play(text)
    if REWRITE:
        path.write_text(played)
    else:
        assert played == text


def test_the_guide_lists_every_script_by_its_title() -> None:
    titles = [f"| `{path.name}` | {path.read_text().splitlines()[0].removeprefix('# ')} |" for path in SCRIPTS]
    assert [line for line in GUIDE.read_text().splitlines() if re.match(r"\| `\d", line)] == titles


def test_every_command_is_explained() -> None:
    commands = [name.removeprefix("_do_") for name in vars(Interpreter) if name.startswith("_do_")]
    assert interaction.__doc__ is not None
    assert [name for name in commands if not re.search(rf"\b{name}\b", interaction.__doc__)] == []


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("cluster\n\nsync r0\n----\n", "not followed"),
        ("sync r0\n----\n", "begin with `cluster`"),
        ("cluster\nsnyc r0\n----\n", "no command"),
        ("cluster\nwrite r0 alice id=a\n----\n", "no item"),
        ("cluster\nwrite 0 alice@1=x id=a\n----\n", "no replica"),
        ("cluster\ndeliver all\n----\n", "no message in flight"),
        ("cluster\ntick 5 r0\n----\n", "no time"),
    ],
)
def test_a_script_that_makes_no_sense_fails(script: str, why: str) -> None:
    with pytest.raises(ScriptError, match=why):
        play(script)


def test_two_values_for_one_entry_are_found_whatever_the_script_expects() -> None:
    interpreter = Interpreter()
    for line in ("cluster", "write r0 alice@10=hello id=a", "stabilize", "write r0 alice@11=x id=b"):
        interpreter.run(line)
    group = interpreter.group
    group.flights[0].batch.messages[0].value.request_ids[0] = b"another".ljust(16, b"\0")  # type: ignore[union-attr]
    with pytest.raises(AssertionError, match="but it was chosen with"):
        interpreter.run("stabilize")
