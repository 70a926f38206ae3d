"""Reads backups. All methods block; whatever they give was checked by its checksum, and errors name the file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..errors import Corrupt, InvalidRequest
from ..messages import TimelineState
from .format import (
    MANIFEST,
    ColdFile,
    Manifest,
    Part,
    check_backup_name,
    decode_cold_files,
    decode_manifest,
    decode_part,
)
from .target import Target

_OPEN_FILES = 16


def complete_backups(target: Target) -> list[Manifest]:
    """Manifests of the complete backups in a folder, the last one first; damaged ones are left out."""
    found: list[Manifest] = []
    for folder in target.entries()[0]:
        try:
            found.append(read_manifest(target, folder))
        except (Corrupt, InvalidRequest):
            continue  # who asks for it by name is told why
    return sorted(found, key=lambda manifest: (manifest.began_us, manifest.name), reverse=True)


def read_manifest(target: Target, name: str) -> Manifest:
    """Manifest of one backup. Raises Corrupt when it has none or a damaged one, InvalidRequest."""
    file = f"{check_backup_name(name)}/{MANIFEST}"
    if target.size(file) is None:
        raise Corrupt(f"{file} is missing in {target.uri}: that backup is incomplete, and can't be restored")
    return decode_manifest(b"".join(target.raw_pieces(file)), file)


def find_backup(target: Target, name: str | None) -> Manifest:
    """The named backup, or the last complete one. Raises Corrupt, InvalidRequest."""
    if name is not None:
        return read_manifest(target, name)
    complete = complete_backups(target)
    if complete:
        return complete[0]
    folders, files = target.entries()
    if MANIFEST in files:
        raise InvalidRequest(f"{target.uri} is the folder of one backup: pass the folder above it, and --name")
    others = [folder for folder in folders if folder != "cold"]
    if others:
        return read_manifest(target, others[-1])  # which says what is wrong with it
    raise InvalidRequest(f"there is no backup in {target.uri}")


def read_cold_files(target: Target, manifest: Manifest) -> list[ColdFile]:
    """The cold files that a backup needs. Raises Corrupt."""
    return decode_cold_files(target.read(manifest.cold_files), manifest.cold_files.name)


def read_part(target: Target, part: Part, buckets: int) -> Iterator[TimelineState]:
    """The states of a part, after both of its files were read and checked. Raises Corrupt."""
    timelines, items = target.read(part.timelines), target.read(part.items)
    found = 0
    for state in decode_part(timelines, items, part.items.name, buckets):
        found += not state.before
        yield state
    if found != part.timeline_count:
        raise Corrupt(f"{part.timelines.name} of the backup has {found} timelines, not {part.timeline_count}")


def require_all(target: Target, manifest: Manifest) -> None:
    """See that all parts are there, by name and size alone. Raises Corrupt, naming the first that is not."""
    sizes = {f"{manifest.name}/{file}": size for file, size in target.entries(manifest.name)[1].items()}
    for stored in (manifest.cold_files, *(file for part in manifest.parts for file in (part.timelines, part.items))):
        if stored.name not in sizes:
            raise Corrupt(f"{stored.name} of the backup is missing in {target.uri}")
        if sizes[stored.name] != stored.size:
            raise Corrupt(f"{stored.name} of the backup has {sizes[stored.name]} bytes, not {stored.size}")


class ColdSource:
    """Where the cold files of a backup are: in the backup, or anywhere below `elsewhere`, by their names."""

    def __init__(self, target: Target, manifest: Manifest, elsewhere: Target | None) -> None:
        self.files = {file.name: file for file in read_cold_files(target, manifest)}
        self._target = elsewhere or target
        self._opened: dict[str, Any] = {}  # files that blocks are read from
        if elsewhere is not None:
            self._places = elsewhere.find()
        else:
            self._places = {name: (f"cold/{name}", size) for name, size in target.entries("cold")[1].items()}

    def require_all(self) -> None:
        """Raises Corrupt, naming the first file that is missing or has another size."""
        for file in self.files.values():
            found = self._places.get(file.name)
            if found is None:
                raise Corrupt(f"cold file {file.name} of the backup is missing in {self._target.uri}")
            if found[1] != file.size:
                raise Corrupt(f"cold file {file.name} of the backup has {found[1]} bytes, not {file.size}")

    def pieces(self, file: ColdFile) -> Iterator[bytes]:
        """A file's bytes, checked. Raises Corrupt."""
        place, _ = self._places[file.name]
        return self._target.pieces(file.stored_at(place))

    def block(self, name: str, offset: int, length: int) -> bytes:
        """Bytes of a block, as they are. Raises Corrupt when the file is missing."""
        if name not in self._places:
            raise Corrupt(f"cold file {name} of the backup is missing in {self._target.uri}")
        place = self._places[name][0]
        opened = self._opened.get(name)
        if opened is None:
            if len(self._opened) >= _OPEN_FILES:
                self._opened.pop(next(iter(self._opened))).close()
            opened = self._opened[name] = self._target.open(place)
        return self._target.read_at(opened, place, offset, length)

    def close(self) -> None:
        """Close the files that blocks were read from."""
        while self._opened:
            self._opened.popitem()[1].close()
