import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from timetier.cluster.durable_file import write_durably
from timetier.cluster.identity import FolderGone, FolderLocked, Identity, Refused, has_identity, open_identity


def open_and_close(
    folder: Path, *, may_format: bool = False, cluster: str = "c1", node: str = "storage-0-1"
) -> Identity:
    identity = open_identity(folder, cluster, node, may_format=may_format)
    identity.close()
    return identity


def test_every_start_has_a_higher_boot_in_the_same_incarnation(tmp_path: Path) -> None:
    lives = [open_and_close(tmp_path / "a" / "b", may_format=True) for _ in range(4)]
    assert [life.boot for life in lives] == [1, 2, 3, 4]
    assert {life.incarnation for life in lives} == {1}
    assert [life.fresh for life in lives] == [True, False, False, False]


@pytest.mark.parametrize("present", [False, True])
def test_an_empty_folder_is_refused_without_permission_to_format(tmp_path: Path, present: bool) -> None:
    folder = tmp_path / "node"
    if present:
        folder.mkdir()
    with pytest.raises(Refused, match="formatted before: it must not vote"):
        open_identity(folder, "c1", "storage-0-1", may_format=False)
    assert not has_identity(folder)


def test_a_foreign_cluster_or_node_is_refused_and_the_boot_stays(tmp_path: Path) -> None:
    open_and_close(tmp_path, may_format=True)
    with pytest.raises(Refused, match="another cluster"):
        open_identity(tmp_path, "c2", "storage-0-1", may_format=True)
    with pytest.raises(Refused, match="another node"):
        open_identity(tmp_path, "c1", "storage-0-2", may_format=True)
    assert open_and_close(tmp_path).boot == 2


def test_any_damaged_byte_of_the_identity_is_noticed(tmp_path: Path) -> None:
    open_and_close(tmp_path, may_format=True)
    path = tmp_path / "IDENTITY"
    good = path.read_bytes()
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1
        path.write_bytes(bytes(bad))
        try:
            same = json.loads(bad) == json.loads(good)
        except ValueError:
            same = False
        if not same:
            with pytest.raises(Refused):
                open_identity(tmp_path, "c1", "storage-0-1", may_format=True)
    for cut in (0, 1, len(good) // 2):
        path.write_bytes(good[:cut])
        with pytest.raises(Refused, match="damaged"):
            open_identity(tmp_path, "c1", "storage-0-1", may_format=True)


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    open_and_close(tmp_path, may_format=True)
    body = json.loads((tmp_path / "IDENTITY").read_bytes())
    (tmp_path / "IDENTITY").write_text(json.dumps({**body, "format": 3}))
    with pytest.raises(Refused, match="newer TimeTier"):
        open_identity(tmp_path, "c1", "storage-0-1", may_format=True)


def test_files_without_an_identity_are_never_formatted_over(tmp_path: Path) -> None:
    (tmp_path / "000012.sst").write_bytes(b"rows")
    with pytest.raises(Refused, match="no IDENTITY"):
        open_identity(tmp_path, "c1", "storage-0-1", may_format=True)
    assert (tmp_path / "000012.sst").read_bytes() == b"rows"


def test_a_crash_while_formatting_leaves_a_folder_that_can_be_formatted(tmp_path: Path) -> None:
    (tmp_path / "LOCK").touch()
    (tmp_path / "IDENTITY.tmp").write_bytes(b'{"format"')
    assert open_and_close(tmp_path, may_format=True).boot == 1


def test_a_folder_that_is_taken_away_while_it_is_opened_can_be_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "node"
    open_identity(folder, "c1", "storage-0-0", may_format=True).close()

    def taken_away(bits: int) -> int:
        folder.rename(tmp_path / "elsewhere")
        return 1

    with monkeypatch.context() as patched:
        patched.setattr(Identity, "_random_bits", staticmethod(taken_away))
        with pytest.raises(FolderGone):
            open_identity(folder, "c1", "storage-0-0", may_format=False)
    identity = open_identity(folder, "c1", "storage-0-0", may_format=False, may_learn=True)
    assert (identity.learning, identity.incarnation) == (True, 0), "it is empty, so all was lost"
    identity.close()


def test_two_threads_that_change_an_identity_at_once_both_have_what_they_wrote(tmp_path: Path) -> None:
    """The shell notes that the Router knows of the folder while the service begins a life as a learner."""
    for number in range(60):
        folder = tmp_path / str(number)
        identity = open_identity(folder, "c1", "storage-0-0", may_format=True)
        together = threading.Barrier(2)

        def begin_incarnation(identity: Identity = identity, together: threading.Barrier = together) -> None:
            together.wait()
            identity.begin_incarnation(7)

        def mark_formatted(identity: Identity = identity, together: threading.Barrier = together) -> None:
            together.wait()
            identity.mark_formatted()

        with ThreadPoolExecutor(2) as threads:
            for done in [threads.submit(begin_incarnation), threads.submit(mark_formatted)]:
                done.result()
        identity.close()
        again = open_identity(folder, "c1", "storage-0-0", may_format=False)
        assert (again.incarnation, again.boot, again.formatted, again.learning) == (7, 2, True, True)
        again.close()


def test_the_acknowledgement_is_kept(tmp_path: Path) -> None:
    identity = open_identity(tmp_path, "c1", "storage-0-1", may_format=True)
    assert not identity.formatted
    identity.mark_formatted()
    identity.close()
    again = open_and_close(tmp_path)
    assert again.formatted
    assert again.boot == 2


HOLD = """
import sys, pathlib
from timetier.cluster.identity import open_identity
open_identity(pathlib.Path(sys.argv[1]), "c1", "storage-0-1", may_format=True)
print("open", flush=True)
sys.stdin.read()
"""


def test_two_processes_never_open_one_folder_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"open\n"
        with pytest.raises(FolderLocked):
            open_identity(tmp_path, "c1", "storage-0-1", may_format=True)
        holder.kill()
        holder.wait(10)
    assert open_and_close(tmp_path).boot == 2


def test_a_durable_file_keeps_its_old_bytes_when_the_write_fails(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_durably(path, b"old")
    assert path.stat().st_mode & 0o777 == 0o600
    (tmp_path / "state.tmp").mkdir()  # so that the temporary file can't be made
    with pytest.raises(OSError):
        write_durably(path, b"new")
    assert path.read_bytes() == b"old"
