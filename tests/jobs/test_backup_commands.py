"""The drill with real actors and the command line: back up under writes, restore to another shape, compare."""

from __future__ import annotations

import contextlib
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from timetier import Store, Table, VersionConflict, connect
from timetier.actors.launch import start_cluster, stop_cluster
from timetier.actors.local_ray import LocalRay
from timetier.cluster.config import Config, load_config
from timetier.jobs.cli_common import run_command
from timetier.jobs.command_line import commands

OLD, NEW = "test-backup-old", "test-backup-new"
OWNERS = [f"owner-{number}" for number in range(20)]
ITEMS = 40


def config_of(folder: Path, namespace: str, groups: int) -> Config:
    loaded = load_config(None, data_dir=folder / namespace)
    return loaded.model_copy(
        update={
            "namespace": namespace,
            "buckets": 128,
            "storage": loaded.storage.model_copy(update={"groups": groups}),
        }
    )


@contextlib.contextmanager
def cluster(config: Config) -> Iterator[Store]:
    start_cluster(config)
    try:
        with connect(namespace=config.namespace) as store:
            yield store
    finally:
        stop_cluster(config.namespace)


class Commands:
    """Runs commands in this process, against a cluster by its namespace."""

    def __init__(self, address: str, folder: Path) -> None:
        self.address = address
        self.folder = folder

    def run(self, namespace: str, *arguments: str, status: int = 0) -> dict[str, Any]:
        options = ["--json", "--address", self.address, "--namespace", namespace, "--data-dir", str(self.folder)]
        out, told = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(told), contextlib.chdir(self.folder):
            found_status = run_command(commands, [*arguments, *options])
        assert found_status == status, told.getvalue()
        found: dict[str, Any] = json.loads(out.getvalue()) if out.getvalue() else {"error": told.getvalue()}
        return found


Found = dict[tuple[str, str], tuple[int, list[tuple[int, bytes, bytes, int, int]]]]


def everything(store: Store, tables: tuple[str, ...]) -> Found:
    """Version and items of each timeline, in pages."""
    found: Found = {}
    for name in tables:
        table = store.table(name)
        for owner in OWNERS:
            page = table.timeline(owner, limit=17)
            version, rows = page.version, list(page.items)
            while page.next:
                page = table.timeline(owner, limit=17, before=page.next)
                rows += page.items
            found[name, owner] = version, [(i.timestamp, i.id, i.value, i.version, i.written_us) for i in rows]
    return found


def fill(store: Store) -> None:
    for name in ("commits", "moments"):
        store.table(name).put_many([(o, at, f"{o} at {at}".encode() * 4) for o in OWNERS for at in range(ITEMS)])


def change(table: Table) -> None:
    """Late writes, deletes and a wipe."""
    for owner in OWNERS[::3]:
        table.put(owner, 5, b"late", id=b"x")
        table.delete(owner, 7)
    table.delete_timeline(OWNERS[1])
    table.put(OWNERS[1], 3, b"begins anew")


def test_the_drill(ray_session: None, local_ray: LocalRay, tmp_path: Path) -> None:
    shell = Commands(local_ray.address, tmp_path)
    with cluster(config_of(tmp_path, OLD, 1)) as store:
        fill(store)
        assert shell.run(OLD, "sink", "--table", "commits", "--before", "20", "--by-event-time")["errors"] == []
        change(store.table("commits"))
        stop = threading.Event()
        versions: list[int] = []

        def write_on() -> None:
            while not stop.is_set():
                versions.append(store.table("moments").put("busy", len(versions), b"%d" % len(versions)))

        writer = threading.Thread(target=write_on)
        writer.start()
        report = shell.run(OLD, "backup", "backups", "--name", "night")
        stop.set()
        writer.join()
        assert report["files_copied"] == report["files"] > 0
        assert report["timelines"] > 2 * len(OWNERS)
        assert {"items", "storage_bytes", "files_kept", "seconds", "mb_per_s"} <= report.keys()
        expected = everything(store, ("commits", "moments"))
    checked = shell.run(OLD, "backup", "backups", "--verify")
    assert (checked["ok"], checked["timelines"], checked["items"]) == (True, report["timelines"], report["items"])
    with cluster(config_of(tmp_path, NEW, 2)) as store:
        refused = shell.run(NEW, "restore", "backups", "--name", "day", status=1)
        assert "day/manifest.json is missing" in refused["error"]
        damage = next((tmp_path / "backups" / "night").glob("items-*.arrow"))
        good = damage.read_bytes()
        damage.write_bytes(good[:-100] + bytes((good[-100] ^ 4,)) + good[-99:])
        assert damage.name in shell.run(NEW, "restore", "backups", status=1)["error"]
        state = shell.run(NEW, "status")
        assert state["router"]["restoring"]["phase"] == "copying"
        assert all("restored" in node["reason"] for node in state["nodes"] if node["tier"] == "storage")
        given_up = shell.run(NEW, "restore", "--abandon")["abandoned"]
        assert given_up.startswith("night-"), "nothing was installed yet"
        damage.write_bytes(good)
        restored = shell.run(NEW, "restore", "backups")
        assert (restored["timelines"], restored["items"]) == (report["timelines"], report["items"])
        assert everything(store, ("commits", "moments")) == expected
        busy = store.table("moments").timeline("busy", limit=1)
        assert [item.value for item in busy.items] == [b"%d" % (busy.version - 1)]
        assert shell.run(NEW, "verify")["ok"]
        table = store.table("commits")
        version = expected["commits", OWNERS[4]][0]
        with pytest.raises(VersionConflict):
            table.put(OWNERS[4], 99, b"no", if_version=version + 1)
        assert table.put(OWNERS[4], 99, b"yes", if_version=version) == version + 1
        assert shell.run(NEW, "sink", "--table", "commits", "--before", "30", "--by-event-time")["errors"] == []
        values = [item.value for item in table.iterate(OWNERS[4])]
        assert values == [b"yes", *(row[2] for row in expected["commits", OWNERS[4]][1])]
        assert shell.run(NEW, "restore", "--abandon")["abandoned"] == ""
