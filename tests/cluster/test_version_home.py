"""Where version caches lie: shared memory that is really there, belongs to one process, and does not pile up."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_disk import small_disk
from timetier.cluster.identity import Identity, open_identity
from timetier.cluster.storage import version_home
from timetier.cluster.storage.version_home import PrivateVersions, SharedVersions, file_name, open_home, owner_of, sweep

SIZE = 1 << 20
DIGEST = b"0123456789abcdef"


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    folder = tmp_path / "shared"
    folder.mkdir()
    return folder


def node(tmp_path: Path, name: str = "storage-0-0") -> Identity:
    """The data folder of a node, opened for its next life."""
    return open_identity(tmp_path / name, "cluster", name, may_format=True)


def note_one(home: SharedVersions | PrivateVersions, identity: Identity, version: int) -> None:
    home.open(owner_of(identity, 64, [1, 2], 5)).note(DIGEST, np.array([version]))


def version_in(shared: Path, identity: Identity, owned: list[int]) -> int:
    home = open_home(shared, identity, SIZE)
    assert isinstance(home, SharedVersions)
    found: int = home.open(owner_of(identity, 64, owned, 5)).look_up(DIGEST)[0]
    os.close(home._file)
    return found


def write_and_let_go(shared: Path, identity: Identity, version: int) -> None:
    home = open_home(shared, identity, SIZE)
    assert isinstance(home, SharedVersions)
    note_one(home, identity, version)
    os.close(home._file)


def test_the_next_life_of_a_folder_has_the_same_memory(tmp_path: Path, shared: Path) -> None:
    identity = node(tmp_path)
    write_and_let_go(shared, identity, 7)
    identity.begin_life()
    assert version_in(shared, identity, [1, 2]) == 7
    identity.begin_life()
    assert version_in(shared, identity, [1, 2]) == 7
    identity.close()


def test_memory_of_another_share_of_the_buckets_incarnation_or_boot_of_the_machine_is_empty(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = node(tmp_path)
    write_and_let_go(shared, identity, 7)
    identity.begin_life()
    assert version_in(shared, identity, [1, 2, 3]) == -1
    identity.begin_life()
    write_and_let_go(shared, identity, 8)
    identity.begin_incarnation(2)
    assert version_in(shared, identity, [1, 2]) == -1
    identity.begin_life()
    write_and_let_go(shared, identity, 9)
    identity.begin_life()
    (tmp_path / "boot_id").write_text("another")
    monkeypatch.setattr(version_home, "BOOT_ID", tmp_path / "boot_id")
    assert version_in(shared, identity, [1, 2]) == -1
    identity.close()


def test_a_copy_of_a_folder_at_another_place_has_memory_of_its_own(tmp_path: Path, shared: Path) -> None:
    one, other = node(tmp_path), node(tmp_path / "copy")
    assert file_name(one) != file_name(other)
    one.close()
    other.close()


def test_without_room_or_folder_the_cache_is_private_and_says_so(
    tmp_path: Path, shared: Path, caplog: pytest.LogCaptureFixture
) -> None:
    identity = node(tmp_path)
    with caplog.at_level(logging.WARNING):
        home = open_home(tmp_path / "nowhere", identity, SIZE)
    assert isinstance(home, PrivateVersions)
    note_one(home, identity, 3)
    with small_disk(tmp_path / "small", 4 << 20) as disk, disk.refusing(), caplog.at_level(logging.WARNING):
        home = open_home(disk.folder, identity, SIZE)
        assert isinstance(home, PrivateVersions)
        assert not list(disk.folder.glob("timetier-*"))
    assert len(caplog.records) == 2
    assert all("private memory" in record.message for record in caplog.records)
    assert isinstance(open_home(None, identity, SIZE), PrivateVersions)
    identity.close()


HOLDER = """
import sys
from pathlib import Path
from timetier.cluster.storage.version_home import SharedVersions
home = SharedVersions(Path(sys.argv[1]), Path(sys.argv[2]), 1 << 20)
print("has it", flush=True)
sys.stdin.read()
"""


def test_two_processes_never_have_one_memory(tmp_path: Path, shared: Path) -> None:
    identity = node(tmp_path)
    path = shared / file_name(identity)
    command = [sys.executable, "-c", HOLDER, str(path), str(identity.folder)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"has it\n"
    assert isinstance(open_home(shared, identity, SIZE), PrivateVersions)
    holder.kill()
    holder.communicate()
    home = open_home(shared, identity, SIZE)
    assert isinstance(home, SharedVersions)
    home.remove()
    assert not path.exists()
    identity.close()


def test_a_name_that_is_a_link_or_somebody_elses_is_not_used(tmp_path: Path, shared: Path) -> None:
    identity = node(tmp_path)
    target = tmp_path / "precious"
    target.write_bytes(b"data")
    (shared / file_name(identity)).symlink_to(target)
    assert isinstance(open_home(shared, identity, SIZE), PrivateVersions)
    assert target.read_bytes() == b"data"
    identity.close()


def test_files_of_folders_that_are_gone_are_removed_by_the_next_node(tmp_path: Path, shared: Path) -> None:
    gone, there, running = (node(tmp_path, f"storage-0-{number}") for number in range(3))
    write_and_let_go(shared, gone, 1)
    write_and_let_go(shared, there, 1)
    home = open_home(shared, running, SIZE)
    (shared / "timetier-no-cache.versions").write_bytes(b"")
    (shared / "something else").write_bytes(b"")
    for identity in (gone, running):
        (identity.folder / "IDENTITY").unlink()
    sweep(shared, shared / "mine")
    names = sorted(path.name for path in shared.iterdir())
    assert names == sorted([file_name(there), file_name(running), "timetier-no-cache.versions", "something else"])
    home.remove()
    for identity in (gone, there, running):
        identity.close()
