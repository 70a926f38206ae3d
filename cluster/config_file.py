"""Reading a YAML configuration file, and saying exactly what is wrong with it.

YAML lets the last of two equal keys win in silence, and a schema checker knows neither lines nor what its reader
meant. So this keeps the place of every field, refuses repeated keys, and turns each error into a line of text:
`FILE:LINE: field = value: what is wrong, what to write instead`.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from .errors import ConfigError

MAX_FILE_BYTES = 4 << 20
MAX_FIELDS = 100_000
MAX_ERRORS = 20  # lines of one error text
MAX_VALUE_CHARS = 80

Place = tuple[str | int, ...]


@dataclass
class ConfigDocument:
    """A configuration file as read. `lines`: the line (from 1) on which each field stands."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[Place, int] = field(default_factory=dict)
    folder: Path = field(default_factory=Path)

    def at(self, place: Place) -> str:
        """`file:line` of a field; of the innermost section that exists, when the field does not."""
        for end in range(len(place), 0, -1):
            if place[:end] in self.lines:
                return f"{self.name}:{self.lines[place[:end]]}"
        return self.name

    def value(self, place: Place, otherwise: object) -> object:
        """What the file says there, before it was converted."""
        found: Any = self.values
        for part in place:
            if not isinstance(found, dict | list) or (part not in found if isinstance(found, dict) else False):
                return otherwise
            found = found[part]  # type: ignore[index]
        return found


class _Loader(yaml.SafeLoader):
    """Safe loader that turns no text into dates: nothing here is a date."""


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in resolvers if pair[0] != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_document(path: Path) -> ConfigDocument:
    """Fields of a YAML file with their lines. Raises ConfigError."""
    name = str(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{name}: there is no such file: name an existing one, or none for the default") from None
    except OSError as error:
        raise ConfigError(f"{name}: can't be read ({error.strerror}): name a readable YAML file") from None
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(f"{name}: more than {MAX_FILE_BYTES >> 20} MiB: this is no configuration file")
    document = ConfigDocument(name, folder=path.absolute().parent)
    try:
        loader = _Loader(raw)
        try:
            node = loader.get_single_node()
            if node is None:  # empty, or comments only: all defaults
                return document
            if not isinstance(node, yaml.MappingNode):
                raise ConfigError(
                    f"{_mark(document, node)}: write fields as `name: value`, not a list or a single value"
                )
            _note_places(document, loader, node, ())
            document.values = loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        text = " ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{at}: this is no YAML: {text}; look for tabs, and for a missing `: ` or quote") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: this is no YAML: {' '.join(str(error).split())}; write UTF-8 text") from None
    return document


def _mark(document: ConfigDocument, node: yaml.Node) -> str:
    return f"{document.name}:{node.start_mark.line + 1}"


def _note_places(document: ConfigDocument, loader: _Loader, node: yaml.Node, place: Place) -> None:
    """Keep the line of every field below `node`. Raises ConfigError for what YAML allows and a reader overlooks."""
    if isinstance(node, yaml.SequenceNode):
        for index, element in enumerate(node.value):
            document.lines[(*place, index)] = element.start_mark.line + 1
            _note_places(document, loader, element, (*place, index))
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        at = _mark(document, key_node)
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise ConfigError(
                f"{at}: {_dotted((*place, str(key_node.value)))}: YAML reads this name as {type(key).__name__}, "
                "not as text: write it in quotes"
            )
        where = (*place, key)
        if key in seen:
            raise ConfigError(
                f"{at}: {_dotted(where)}: given a second time (first on line {seen[key]}): remove one of the two"
            )
        seen[key] = key_node.start_mark.line + 1
        document.lines[where] = seen[key]
        if len(document.lines) > MAX_FIELDS:  # a few aliases of aliases can stand for billions of fields
            raise ConfigError(f"{at}: more than {MAX_FIELDS} fields: this is no configuration file")
        _note_places(document, loader, value_node, where)


def describe_errors(document: ConfigDocument, model: type[BaseModel], error: ValidationError) -> str:
    """One line for each thing that is wrong: file, line, field, value and remedy."""
    problems = error.errors(include_url=False)
    lines = [_describe(document, model, dict(problem)) for problem in problems[:MAX_ERRORS]]
    if len(problems) > MAX_ERRORS:
        lines.append(f"{document.name}: and {len(problems) - MAX_ERRORS} more")
    return "\n".join(lines)


def _describe(document: ConfigDocument, model: type[BaseModel], problem: dict[str, Any]) -> str:
    place: Place = problem["loc"]
    kind, message = problem["type"], problem["msg"]
    if kind == "json_invalid":
        return f"{document.name}: this is no JSON: {message}"
    info = _field_at(model, place)
    expected = f"write {_expected(info)} ({info.description})" if info else message
    if kind == "missing":
        return f"{document.at(place)}: {_dotted(place)} is missing: {expected}"
    subject = f"{document.at(place)}: {_dotted(place)} = {_shown(document.value(place, problem['input']))}: "
    if kind == "extra_forbidden":
        return subject + _unknown_field(model, place)
    if isinstance(problem["input"], dict | BaseModel):  # a whole section: the text of the check names the field
        message = str(problem.get("ctx", {}).get("error", message))
        field_place = (*place, *message.split(maxsplit=1)[0].split("."))
        if _is_field(model, field_place):
            return f"{document.at(field_place)}: {_dotted((*place, message))}"
        return f"{document.at(place)}: {_dotted(place)}{': ' if place else ''}{message}"
    if kind == "value_error":  # raised by a validator, which knows the remedy
        return subject + str(problem["ctx"]["error"])
    return subject + expected


def _shown(value: object) -> str:
    if isinstance(value, str):
        text = repr(value)
    else:
        text = {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))
    return text if len(text) <= MAX_VALUE_CHARS else text[:MAX_VALUE_CHARS] + "..."


def _dotted(place: Place) -> str:
    return ".".join(str(part) for part in place)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def _section_at(model: type[BaseModel], place: Place) -> type[BaseModel] | None:
    """Model of the section at `place`."""
    section: type[BaseModel] | None = model
    parts = iter(place)
    for part in parts:
        info = section.model_fields.get(str(part)) if section else None
        if info is None:
            return None
        section = next(_models_in(info.annotation), None)
        if get_origin(info.annotation) is dict:
            next(parts, None)  # the name under which it stands
    return section


def _is_field(model: type[BaseModel], place: Place) -> bool:
    section = _section_at(model, place[:-1])
    return section is not None and place[-1] in section.model_fields


def _field_at(model: type[BaseModel], place: Place) -> FieldInfo | None:
    """Field at `place`, or the one that it lies in."""
    for end in range(len(place), 0, -1):
        section = _section_at(model, place[: end - 1])
        if section and place[end - 1] in section.model_fields:
            return section.model_fields[str(place[end - 1])]
    return None


def _unknown_field(model: type[BaseModel], place: Place) -> str:
    name = str(place[-1])
    section = _section_at(model, place[:-1]) or model
    known = list(section.model_fields)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"there is no such field: did you mean {_dotted((*place[:-1], close[0]))}?"
    elsewhere = [
        f"{other}.{name}"
        for other, info in model.model_fields.items()
        for inner in _models_in(info.annotation)
        if name in inner.model_fields and get_origin(info.annotation) is not dict
    ]
    if name in model.model_fields:
        elsewhere.insert(0, f"{name} (not indented)")
    if elsewhere:
        return f"there is no such field here: write it as {' or '.join(elsewhere)}"
    return f"there is no such field: the known ones here are {', '.join(known)}"


def _expected(info: FieldInfo) -> str:
    """What a field takes, in words."""
    annotation: Any = info.annotation
    optional = False
    metadata: list[Any] = list(info.metadata)
    if get_origin(annotation) in (Union, types.UnionType):
        options = [option for option in get_args(annotation) if option is not type(None)]
        optional = len(options) < len(get_args(annotation))
        annotation = options[0]
    while hasattr(annotation, "__metadata__"):
        metadata += annotation.__metadata__
        annotation = get_args(annotation)[0]
    metadata = [part for item in metadata for part in getattr(item, "metadata", [item])]
    text = _kind_in_words(annotation, any(getattr(part, "func", None) for part in metadata))
    low = next((part.ge for part in metadata if isinstance(part, annotated_types.Ge)), None)
    high = next((part.le for part in metadata if isinstance(part, annotated_types.Le)), None)
    if low is not None and high is not None:
        in_words = _duration_in_words if "duration" in text else str
        text += f" from {in_words(low)} to {in_words(high)}"
    return text + (", or null" if optional else "")


def _duration_in_words(seconds: Any) -> str:
    for unit, length in (("y", 365 * 86_400), ("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds and seconds % length == 0:
            return f"{int(seconds // length)}{unit}"
    return f"{seconds:g}s"


def _kind_in_words(annotation: Any, has_parser: bool) -> str:
    if get_origin(annotation) is Literal:
        return " or ".join(str(choice) for choice in get_args(annotation))
    if annotation is int:
        return "a whole number"
    if annotation is float:
        return "a duration such as 90s, 15m, 36h, 30d or 4y" if has_parser else "a number"
    if annotation is Path:
        return "a path"
    if annotation is str:
        return "text"
    if annotation is bool:
        return "true or false"
    if get_origin(annotation) is list:
        return "a list of texts, such as [a, b, c]"
    return "a section of indented `name: value` lines"
