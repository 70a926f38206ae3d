"""Every interaction script of `testdata/` does what it says.

A script is commands with their expected output (see `interaction.py`). After a change that is meant to change
outputs, have them written anew and read the difference as you would read code:

    TIMETIER_REWRITE=1 pytest tests/cluster/test_interactions.py && git diff tests/cluster/testdata
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from interaction import Interpreter
from interaction_command import ScriptError

SCRIPTS = sorted((Path(__file__).parent / "testdata").glob("*.txt"))
REWRITE = os.environ.get("TIMETIER_REWRITE") == "1"


def play(text: str) -> str:
    """A script with its outputs as they come out."""
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
