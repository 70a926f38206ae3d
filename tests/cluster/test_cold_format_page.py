"""`docs/cold-format.md` is true: its program recovers a cold folder, and a file is what it says, byte by byte."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import google_crc32c
import msgspec
import pyarrow as pa
import pytest
from open_tiers import SMALL_BLOCKS, tiers_in_thread
from storage_cluster import POLICY
from timetier.cluster.cold.block import decode_block, read_index
from timetier.cluster.cold.link import Link, encode_link

PAGE = Path(__file__).parents[2] / "docs" / "cold-format.md"
STEP = POLICY.window // 10
OWNERS = [f"owner-{number}" for number in range(9)]
Rows = dict[tuple[bytes, int, bytes], bytes]


def program() -> str:
    """The reader in the page."""
    (found,) = re.findall(r"<!-- recover\.py -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return str(found)


@pytest.fixture(scope="module")
def sunk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Rows]:
    """A folder with three cold nodes whose files are of several generations, and what they must hold."""
    import dataclasses

    folder = tmp_path_factory.mktemp("cold")
    keep_old = dataclasses.replace(SMALL_BLOCKS, orphan_grace_s=3600)
    rows: Rows = {}
    with tiers_in_thread(folder) as tiers:
        table = tiers.table()
        for turn in range(3):
            count = 0
            for number, owner in enumerate(OWNERS):
                items = [
                    (owner, at * STEP, b"turn %d of %d" % (turn, at), b"id%d" % (at % 2) if at % 3 else b"\x00\xff")
                    for at in range(turn * 3, 40 - turn)
                    if (at + number + turn) % (turn + 1) == 0
                ]
                table.put_many(items)
                rows.update({(owner.encode(), timestamp, i): value for owner, timestamp, value, i in items})
                count += len(items)
            gone = OWNERS[turn], (6 + turn) * STEP, b"id%d" % ((6 + turn) % 2) if (6 + turn) % 3 else b"\x00\xff"
            table.delete(gone[0], gone[1], id=gone[2])
            rows.pop((gone[0].encode(), gone[1], gone[2]), None)
            tiers.sink_all(count, settings=keep_old)
        for _ in range(3):
            tiers.sink(settings=keep_old)
    return folder, rows


def run_program(folder: Path, source: list[Path], *options: str) -> tuple[int, str, Rows]:
    """Exit status, words, and the rows that the page's program recovers of some folders, each once."""
    script, target = folder / "recover.py", folder / "recovered"
    script.write_text(program())
    target.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, *options, str(script), str(target), *map(str, source)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    found: Rows = {}
    for path in target.glob("*.arrow"):
        assert path.name == "t.arrow"
        with pa.ipc.open_file(str(path)) as reader:
            for row in reader.read_all().to_pylist():
                key = row["owner"], row["timestamp"], row["id"]
                assert key not in found
                found[key] = row["value"]
    return done.returncode, done.stderr, found


def test_the_reader_in_the_page_has_fifty_lines_at_the_most() -> None:
    assert len(program().splitlines()) <= 50


def test_the_reader_in_the_page_recovers_all_items_of_a_cold_folder(sunk: tuple[Path, Rows], tmp_path: Path) -> None:
    folder, rows = sunk
    indices = [read_index(str(path)) for path in (folder / "cold-0-0").rglob("*.arrow")]
    assert {block.generation for index in indices for block in index.blocks} >= {1, 2, 3}
    status, words, found = run_program(tmp_path, [folder / "cold-0-0"])
    assert (status, words) == (0, "")
    assert found == rows


def test_the_reader_in_the_page_needs_pyarrow_alone(sunk: tuple[Path, Rows], tmp_path: Path) -> None:
    folder, rows = sunk
    bare = tmp_path / "bare"
    venv.create(bare, symlinks=True)
    site = next(bare.glob("lib/python*/site-packages"))
    for name in ("pyarrow", "pyarrow.libs"):
        package = Path(pa.__file__).parent.with_name(name)
        if package.exists():
            (site / name).symlink_to(package)
    script, target = tmp_path / "recover.py", tmp_path / "recovered"
    script.write_text(program())
    target.mkdir()
    python = [str(bare / "bin" / "python"), "-I"]
    others = "import importlib.util as u, sys; sys.exit(any(map(u.find_spec, ['google_crc32c', 'numpy', 'timetier'])))"
    subprocess.run([*python, "-c", others], check=True, timeout=60)
    subprocess.run([*python, str(script), str(target), str(folder / "cold-0-1")], check=True, timeout=60)
    with pa.ipc.open_file(str(target / "t.arrow")) as reader:
        assert reader.read_all().num_rows == len(rows)


def test_the_reader_in_the_page_passes_over_damage_and_says_what_is_lost(
    sunk: tuple[Path, Rows], tmp_path: Path
) -> None:
    folder, rows = sunk
    copies = [tmp_path / "one", tmp_path / "two"]
    for copy in copies:
        copy.mkdir()
        for path in (folder / "cold-0-0").rglob("*.arrow"):
            (copy / path.name).write_bytes(path.read_bytes())
    newest = max(copies[0].iterdir(), key=lambda path: max(b.generation for b in read_index(str(path)).blocks))
    block = max(read_index(str(newest)).blocks, key=lambda block: block.generation)
    data = bytearray(newest.read_bytes())
    data[block.offset + block.length - 20] ^= 4
    newest.write_bytes(data)
    other = next(path for path in copies[1].iterdir() if path.name != newest.name)
    other.write_bytes(other.read_bytes()[:-100])
    status, words, found = run_program(tmp_path, copies)
    assert status == 0 and other.name in words
    assert found == rows

    (copies[1] / newest.name).write_bytes(data)
    status, words, found = run_program(tmp_path, copies)
    assert status == 1 and f"{newest.name}, block at {block.offset}" in words
    assert found.items() <= rows.items() and len(found) == len(rows) - block.rows


# ---------------------------------------------------------------- byte by byte


class Flat:
    """A table of a flatbuffer, read by hand: https://flatbuffers.dev/internals"""

    def __init__(self, data: bytes, at: int | None = None) -> None:
        self.data = data
        self.at = struct.unpack_from("<I", data)[0] if at is None else at
        self._fields = self.at - struct.unpack_from("<i", data, self.at)[0]

    def place(self, number: int) -> int:
        """Where a field lies, 0 if it is absent."""
        size = struct.unpack_from("<H", self.data, self._fields)[0]
        slot = 4 + 2 * number
        offset = struct.unpack_from("<H", self.data, self._fields + slot)[0] if slot < size else 0
        return self.at + offset if offset else 0

    def scalar(self, number: int, form: str) -> Any:
        at = self.place(number)
        return struct.unpack_from(form, self.data, at)[0] if at else 0

    def follow(self, number: int) -> int:
        at = self.place(number)
        return at + int(struct.unpack_from("<I", self.data, at)[0])

    def table(self, number: int) -> Flat:
        return Flat(self.data, self.follow(number))

    def structs(self, number: int, form: str) -> list[tuple[Any, ...]]:
        at = self.follow(number)
        count = struct.unpack_from("<I", self.data, at)[0]
        return [struct.unpack_from(form, self.data, at + 4 + n * struct.calcsize(form)) for n in range(count)]


def decoded(message: bytes) -> list[list[Any]]:
    """The columns of a block, by the page alone."""
    assert message[:4] == b"\xff\xff\xff\xff"
    (size,) = struct.unpack_from("<i", message, 4)
    assert size % 8 == 0
    header = Flat(message[8 : 8 + size])
    assert header.scalar(0, "<h") == 4 and header.scalar(1, "<B") == 3  # MetadataVersion.V5, MessageHeader.RecordBatch
    body = message[8 + size :]
    assert header.scalar(3, "<q") == len(body)
    batch = header.table(2)
    rows = batch.scalar(0, "<q")
    assert batch.structs(1, "<qq") == [(rows, 0)] * 6
    places = batch.structs(2, "<qq")
    assert len(places) == 15
    codec = {0: "lz4", 1: "zstd"}[batch.table(3).scalar(0, "<b")] if batch.place(3) else None

    def buffer(number: int) -> bytes:
        offset, length = places[number]
        assert offset % 8 == 0
        data = body[offset : offset + length]
        if codec is None or not data:
            return data
        (plain,) = struct.unpack_from("<q", data)
        return data[8:] if plain == -1 else pa.decompress(data[8:], plain, codec, asbytes=True)

    columns: list[list[Any]] = []
    at = 0
    for kind in ("binary", "int64", "binary", "binary", "int64", "int64"):
        assert not buffer(at), "a validity buffer is empty"
        if kind == "int64":
            columns.append(list(struct.unpack_from(f"<{rows}q", buffer(at + 1))))
            at += 2
        else:
            ends = struct.unpack_from(f"<{rows + 1}i", buffer(at + 1))
            data = buffer(at + 2)
            columns.append([data[low:high] for low, high in zip(ends, ends[1:], strict=False)])  # noqa: RUF007
            at += 3
    return columns


def test_a_file_is_laid_out_as_the_page_says(sunk: tuple[Path, Rows]) -> None:
    folder, _ = sunk
    path = max((folder / "cold-0-2").rglob("*.arrow"), key=lambda path: path.stat().st_size)
    data = path.read_bytes()
    assert data[:8] == b"ARROW1\x00\x00" and data[-6:] == b"ARROW1"
    (size,) = struct.unpack_from("<i", data, len(data) - 10)
    footer = Flat(data[-10 - size : -10])
    places = footer.structs(3, "<qi4xq")
    with pa.ipc.open_file(str(path)) as reader:
        about, text = dict(reader.schema.metadata), reader.metadata[b"timetier.index"]
    assert set(about) == {
        b"timetier.format",
        b"timetier.table",
        b"timetier.timestamp_per_second",
        b"timetier.cold_group",
        b"timetier.run",
        b"timetier.file",
    }
    assert (about[b"timetier.format"], about[b"timetier.table"]) == (b"1", b"t")
    assert about[b"timetier.file"].decode() == path.name
    index = json.loads(text)
    names = ["bucket", "window_start", "window_end", "generation", "rows", "offset", "length", "crc"]
    assert index["columns"] == names and list(index) == ["columns", "blocks", "head", "tail"]
    end = 8 + 8 + struct.unpack_from("<i", data, 12)[0]
    assert f"{google_crc32c.value(data[:end]):08x}" == index["head"]
    for place, row in zip(places, index["blocks"], strict=True):
        block = dict(zip(names, row, strict=True))
        assert block["offset"] == end, "no gaps"
        end += block["length"]
        message = data[block["offset"] : end]
        assert google_crc32c.value(message) == block["crc"]
        (metadata,) = struct.unpack_from("<i", message, 4)
        assert place == (block["offset"], 8 + metadata, block["length"] - 8 - metadata)
        owners, timestamps, ids, values, versions, written = decoded(message)
        rows = decode_block(message).batch
        assert [owners, timestamps, ids, values, versions, written] == [c.to_pylist() for c in rows.columns]
        assert len(owners) == block["rows"]
        assert sorted(set(zip(owners, timestamps, ids, strict=True))) == list(zip(owners, timestamps, ids, strict=True))
        assert all(block["window_start"] <= timestamp < block["window_end"] for timestamp in timestamps)
    assert data[end : end + 8] == b"\xff\xff\xff\xff\x00\x00\x00\x00"
    tail = data[end:]
    assert tail.count(index["tail"].encode()) == 1
    assert f"{google_crc32c.value(tail.replace(index['tail'].encode(), b'0' * 8)):08x}" == index["tail"]


def test_links_have_the_elements_that_the_page_names() -> None:
    page = PAGE.read_text()
    link = Link(1, 2, b"t", 0, 10, 1, 10, 20, b"", b"", 0, 0, "run", [])
    assert msgspec.msgpack.decode(encode_link(link))[:4] == [1, 2, b"t", 0]
    text = page[page.index("- link: ") : page.index("- block: ")]
    assert [name for name in re.findall(r"`(\w+)`", text) if name in Link.__struct_fields__] == list(
        Link.__struct_fields__
    )
