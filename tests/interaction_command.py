"""One line of an interaction script, parsed: `name argument ... option=value ...`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from interaction_text import owner_key
from timetier.cluster.keys import bucket_of, item_key, system_timeline
from timetier.cluster.messages import Ballot

ITEM = re.compile(r"(?P<owner>\w+)@(?P<time>-?\d+)(:(?P<id>\w+))?(=(?P<value>.*))?")


class ScriptError(Exception):
    """A command that can't be understood, or not be carried out."""


@dataclass(slots=True)
class Command:
    """A line's name, its plain arguments and its options."""

    name: str
    args: list[str] = field(default_factory=list)
    options: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, line: str) -> Command:
        name, *words = line.split()
        found = cls(name)
        for word in words:
            key, equals, value = word.partition("=")
            if equals and key.isidentifier():
                found.options[key] = value
            else:
                found.args.append(word)
        return found

    def arg(self, at: int, what: str) -> str:
        """A plain argument. Raises ScriptError that it needs `what`."""
        if at >= len(self.args):
            raise ScriptError(f"{self.name} needs {what}")
        return self.args[at]

    def option(self, name: str, default: str | None = None) -> str:
        value = self.options.get(name, default)
        if value is None:
            raise ScriptError(f"{self.name} needs {name}=")
        return value

    def number(self, name: str, default: int | None = None) -> int:
        word = self.option(name, None if default is None else str(default))
        if not re.fullmatch(r"-?\d+", word):
            raise ScriptError(f"{name}={word} is no number")
        return int(word)

    def milliseconds(self, name: str, default: str) -> int:
        return round(seconds(self.option(name, default)) * 1000)

    def replica(self, at: int = 0) -> int:
        return replica_number(self.arg(at, "a replica"))

    def replicas(self) -> list[int]:
        """All arguments that are replicas."""
        return [replica_number(word) for word in self.args if re.fullmatch(r"r\d", word)]

    def owner(self, at: int = 1) -> bytes:
        """Timeline of an argument `OWNER`, or `links(OWNER)` for the system timeline of the owner's bucket."""
        word = self.arg(at, "an owner")
        links = re.fullmatch(r"links\((\w+)\)", word)
        return system_timeline(bucket_of(owner_key(links[1]))) if links else owner_key(word)

    def items(self) -> tuple[bytes, list[tuple[bytes, bytes]]]:
        """The timeline of arguments `OWNER@TIME[:ID][=VALUE]`, and their item keys and values."""
        found = []
        for word in [self.arg(1, "an item"), *self.args[2:]]:
            match = ITEM.fullmatch(word)
            if not match:
                raise ScriptError(f"{word!r} is no item: write alice@10=hello")
            found.append(match)
        if len({match["owner"] for match in found}) > 1:
            raise ScriptError(f"{self.name} is of one owner")
        pairs = [
            (item_key(int(match["time"]), (match["id"] or "").encode()), (match["value"] or "").encode())
            for match in found
        ]
        return owner_key(found[0]["owner"]), pairs


def replica_number(word: str) -> int:
    if not re.fullmatch(r"r\d", word):
        raise ScriptError(f"{word!r} is no replica: write r0, r1 ...")
    return int(word[1:])


def seconds(word: str) -> float:
    for unit, scale in (("ms", 1000), ("s", 1)):
        if re.fullmatch(rf"\d+{unit}", word):
            return int(word.removesuffix(unit)) / scale
    raise ScriptError(f"{word!r} is no time: write 5ms or 2s")


def request_id(word: str) -> bytes:
    """16 bytes that `interaction_text.id_text` turns back into the word."""
    encoded = word.encode()
    if not 0 < len(encoded) <= 16:
        raise ScriptError(f"id={word} is no request id: 1 to 16 letters")
    return encoded.ljust(16, b"\0")


def parse_ballot(word: str) -> Ballot:
    found = re.fullmatch(r"(\d+)\.r(\d)\.i(\d+)\.b(\d+)", word)
    if not found:
        raise ScriptError(f"{word!r} is no ballot: write 0.r0.i1.b1")
    number, replica, incarnation, boot = map(int, found.groups())
    return number, (replica, incarnation, boot)
