"""How a bug is planted in the production code: one line of a function is replaced, for a while.

The function keeps its identity and gets other code, so whoever holds a reference to it runs the bug too. A line that
is not found is an error: the table of bugs follows the code, or fails loudly.
"""

from __future__ import annotations
import __future__

import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any


class NotPlanted(Exception):
    """The line to replace is not, or not only once, in the function."""


@dataclass(frozen=True)
class Edit:
    """`old` becomes `new` in a function. `where`: as `paxos.acceptor:Acceptor.on_accept`, below `timetier.cluster`."""

    where: str
    old: str
    new: str

    @contextmanager
    def planted(self) -> Iterator[None]:
        """Have the production code contain the edit. Raises NotPlanted."""
        function = self.function()
        before = function.__code__
        function.__code__ = self._code(function)
        try:
            yield
        finally:
            function.__code__ = before

    def function(self) -> FunctionType:
        """The function that is edited."""
        module, _, name = self.where.partition(":")
        found: Any = importlib.import_module(f"timetier.cluster.{module}")
        for part in name.split("."):
            found = inspect.getattr_static(found, part)
        found = getattr(found, "__func__", found)
        found = found.fget if isinstance(found, property) else found
        assert isinstance(found, FunctionType), f"{self.where} is no function"
        return found

    def _code(self, function: FunctionType) -> CodeType:
        source = textwrap.dedent(inspect.getsource(function))
        if source.count(self.old) != 1:
            raise NotPlanted(f"{self.where} holds {source.count(self.old)} times: {self.old!r}")
        flags = __future__.annotations.compiler_flag
        lines_before = "\n" * (function.__code__.co_firstlineno - 1)  # tracebacks show where it is
        text = lines_before + source.replace(self.old, self.new)
        module = compile(text, function.__code__.co_filename, "exec", flags, dont_inherit=True)
        (code,) = (one for one in module.co_consts if isinstance(one, CodeType) and one.co_name == function.__name__)
        return code


@dataclass(frozen=True)
class Swap:
    """A function is replaced by `make(function)`; for bugs that are more than a line of what is there."""

    where: str
    make: Callable[[Callable[..., Any]], Callable[..., Any]]

    @contextmanager
    def planted(self) -> Iterator[None]:
        """Have the production code contain the bug."""
        module, _, name = self.where.partition(":")
        owner: Any = importlib.import_module(f"timetier.cluster.{module}")
        *path, last = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        before = getattr(owner, last)
        setattr(owner, last, self.make(before))
        try:
            yield
        finally:
            setattr(owner, last, before)


@dataclass(frozen=True)
class Bug:
    """One bug to be found. `rule`: what it breaks; `changes`: what is planted.

    `plans`: of which kind the seeds are (`biased.PLANS`); `scripts`: directed schedules that find it if no seed does.
    """

    name: str
    rule: str
    changes: tuple[Edit | Swap, ...]
    plans: str = "everything"
    scripts: tuple[str, ...] = ()

    @contextmanager
    def planted(self) -> Iterator[None]:
        """Have the production code contain the bug. Raises NotPlanted."""
        with ExitStack() as stack:
            for change in self.changes:
                stack.enter_context(change.planted())
            yield
