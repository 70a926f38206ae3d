"""The shape of the package: what is installed, who imports whom, and what stays pure."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import timetier

ROOT = Path(__file__).parent.parent
PURE = [
    *(ROOT / "cluster" / "paxos").glob("*.py"),
    *(
        ROOT / "cluster" / "memory" / f"{name}.py"
        for name in (
            *("answering", "block_reads", "hot_cold", "page_cache", "pages", "reading"),
            *("requests", "steps", "votes"),
        )
    ),
    *(ROOT / "cluster" / "client" / f"{name}.py" for name in ("batch", "scripts", "view")),
    *(
        ROOT / "cluster" / "cold" / f"{name}.py"
        for name in (
            *("cold_calls", "file_facts", "filing", "garbage", "gathering", "merging", "pacing", "run_record"),
            *("sink_calls", "sink_report", "sink_run", "sink_script", "sinking", "windows"),
        )
    ),
    *(
        ROOT / "cluster" / f"{name}.py"
        for name in ("comparing", "effects", "keys", "placement", "routing", "suspicion", "topology", "verifying")
    ),
]


def modules() -> list[Path]:
    """Every module of the package, tests and benchmarks left out."""
    return sorted(
        path
        for folder in ("cluster", "actors", "jobs", "configs")
        for path in (ROOT / folder).rglob("*.py")
        if "__pycache__" not in path.parts
    )


def imports(path: Path) -> set[str]:
    """Modules that a file imports, relative ones as `timetier.…`; those for type checkers only are left out."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    package = ("timetier", *path.relative_to(ROOT).parts[:-1])
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            found.add(".".join([*base, *(node.module or "").split(".")]).strip("."))
    return found


def test_this_checkout_is_the_one_under_test() -> None:
    assert Path(timetier.__file__).parent == ROOT


def test_every_folder_with_modules_is_installed() -> None:
    configured = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {".".join(("timetier", *path.parent.relative_to(ROOT).parts)) for path in modules()}
    assert sorted({"timetier", *folders}) == sorted(configured)


def test_each_file_is_imported_under_one_name() -> None:
    """Else every class in it would exist twice, and `isinstance` and `except` would miss."""
    code = (
        "import sys, timetier, timetier.jobs.command_line, timetier.actors.launch\n"
        "files = [getattr(m, '__file__', None) for m in list(sys.modules.values())]\n"
        "files = [f for f in files if f and f.startswith(sys.argv[1])]\n"
        "assert len(files) == len(set(files)) > 50, sorted(f for f in files if files.count(f) > 1)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(ROOT)], check=True, timeout=120)


def test_imports_run_downwards() -> None:
    above = {"cluster": ("timetier.actors", "timetier.jobs", "ray"), "actors": ("timetier.jobs",)}
    for path in modules():
        forbidden = above.get(path.relative_to(ROOT).parts[0], ())
        wrong = {name for name in imports(path) for prefix in forbidden if (name + ".").startswith(prefix + ".")}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


@pytest.mark.parametrize("path", PURE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_protocol_is_pure(path: Path) -> None:
    """No Ray, no asyncio, no clock, no threads; randomness only as an argument's type."""
    found = {name.partition(".")[0] for name in imports(path)}
    assert not found & {"ray", "asyncio", "time", "threading", "socket", "secrets", "uuid", "concurrent"}
    nodes = list(ast.walk(ast.parse(path.read_text())))
    if any(isinstance(node, ast.arg) and node.arg == "random" for node in nodes):
        return  # there `random` is what the caller has given
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "random":
            assert node.attr == "Random", f"{path.name}:{node.lineno} uses the process's random numbers"


def test_importing_the_package_does_not_start_ray() -> None:
    code = "import sys, timetier; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
