"""The Router: what it remembers, what it refuses, and the real actor."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import ray
from small_disk import small_disk
from timetier.actors import router as router_module
from timetier.actors.cold import are_mounted
from timetier.actors.router import Router
from timetier.actors.router_link import RouterLink
from timetier.actors.router_state import MAX_RUNS, RouterState
from timetier.cluster.carriers.base import Address
from timetier.cluster.config import Config, load_config
from timetier.cluster.errors import ConfigError, InvalidRequest, TimeTierError, Unavailable
from timetier.cluster.identity import Refused, open_identity
from timetier.cluster.placement import NodePlace
from timetier.cluster.static_map import StaticMap
from timetier.cluster.topology import Topology


def open_state(folder: Path, config: Config | None = None) -> RouterState:
    return RouterState.open(folder, "ns", config)


def test_a_restarted_router_knows_what_it_knew(tmp_path: Path) -> None:
    first = open_state(tmp_path)
    address = Address(
        "storage-0-1", host="h", unix_path="/run/x", tcp_host="127.0.0.1", tcp_port=7, actor="storage-0-1"
    )
    assert first.register(address)
    assert first.may_format("storage-0-1")
    first.formatted("storage-0-1")
    first.report_run({"run": "r1", "state": "done", "items": 12})

    again = open_state(tmp_path)
    assert again.topology() == first.topology()
    assert again.topology().addresses == {"storage-0-1": address}
    assert len(bytes.fromhex(again.topology().secret)) == 32
    assert again.folders == {"storage-0-1": "formatted"}
    assert again.runs[0]["items"] == 12
    assert again.config == first.config


def test_the_secret_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    open_state(tmp_path)
    assert (tmp_path / "router" / "state.json").stat().st_mode & 0o777 == 0o600


def test_the_epoch_grows_only_when_an_address_changed(tmp_path: Path) -> None:
    state = open_state(tmp_path)
    before = state.epoch
    assert state.register(Address("cache-0-0", tcp_port=1))
    assert not state.register(Address("cache-0-0", tcp_port=1))
    assert state.epoch == before + 1
    assert state.register(Address("cache-0-0", tcp_port=2))
    assert state.epoch == before + 2


def test_an_epoch_that_somebody_has_seen_is_never_reused(tmp_path: Path) -> None:
    state = open_state(tmp_path)
    state.lift_epoch(41)
    assert open_state(tmp_path).epoch == 42


def test_a_node_may_format_until_it_has_reported_that_it_did(tmp_path: Path) -> None:
    state = open_state(tmp_path)
    assert state.may_format("cold-0-2")
    assert open_state(tmp_path).may_format("cold-0-2")
    state.formatted("cold-0-2")
    assert not state.may_format("cold-0-2")
    assert not open_state(tmp_path).may_format("cold-0-2")


def test_a_cold_node_that_was_lost_may_begin_again_once(tmp_path: Path) -> None:
    state = open_state(tmp_path)
    state.may_format("cold-0-1")
    state.lose("cold-0-1")
    assert not state.is_lost("cold-0-1"), "it was never formatted, so it may format anyhow"
    state.formatted("cold-0-1")
    state.lose("cold-0-1")
    assert open_state(tmp_path).is_lost("cold-0-1")
    assert not state.may_format("cold-0-1"), "it begins as one that copies, not as a fresh one"
    state.formatted("cold-0-1")
    assert not open_state(tmp_path).is_lost("cold-0-1")
    with pytest.raises(InvalidRequest, match="no cold node"):
        state.lose("storage-0-1")


def test_only_a_mounted_file_system_proves_that_an_empty_folder_is_no_unmounted_disk(tmp_path: Path) -> None:
    assert are_mounted([Path("/proc")])
    assert not are_mounted([tmp_path])
    assert not are_mounted([Path("/proc"), tmp_path / "not there"])


@pytest.mark.parametrize("node", ["storage-0-3", "cache-1-0", "nobody", ""])
def test_nodes_outside_the_shape_are_refused(tmp_path: Path, node: str) -> None:
    state = open_state(tmp_path)
    for ask in (lambda: state.may_format(node), lambda: state.formatted(node), lambda: state.register(Address(node))):
        with pytest.raises(InvalidRequest, match="no node"):
            ask()


def test_a_damaged_state_is_refused_and_never_replaced(tmp_path: Path) -> None:
    open_state(tmp_path)
    path = tmp_path / "router" / "state.json"
    good = path.read_bytes()
    for bad in (b"", good[:-9], good.replace(b'"epoch":1', b'"epoch":2'), b"{}", good.replace(b"state", b"stata", 1)):
        path.write_bytes(bad)
        with pytest.raises(Refused, match="damaged"):
            open_state(tmp_path)
        assert path.read_bytes() == bad


@pytest.mark.parametrize("damage", ["missing", "flipped", "another"])
def test_a_cluster_is_refused_without_the_map_that_it_was_created_with(tmp_path: Path, damage: str) -> None:
    open_state(tmp_path)
    path = tmp_path / "router" / "static.map"
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "flipped":
        content[-1] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(StaticMap.load(512).to_bytes())
    with pytest.raises(Refused, match=r"static\.map"):
        open_state(tmp_path)


def test_a_cluster_does_not_begin_on_data_of_another_one(tmp_path: Path) -> None:
    open_identity(tmp_path / "storage-0-0", "c", "storage-0-0", may_format=True).close()
    with pytest.raises(Refused, match="storage-0-0"):
        open_state(tmp_path)
    assert not (tmp_path / "router").exists()


def test_a_folder_belongs_to_one_namespace(tmp_path: Path) -> None:
    open_state(tmp_path)
    with pytest.raises(Refused, match="namespace 'ns'"):
        RouterState.open(tmp_path, "other", None)


def test_policies_may_change_but_the_shape_may_not(tmp_path: Path) -> None:
    config = load_config(None, data_dir=tmp_path).model_copy(update={"namespace": "ns"})
    state = open_state(tmp_path, config)
    longer = Config.model_validate({**json.loads(config.to_json()), "tables": {"chats": {"cold_after": "9d"}}})
    changed = open_state(tmp_path, longer)
    assert changed.epoch == state.epoch + 1
    assert list(changed.topology().tables) == ["chats"]
    other = Config.model_validate({**json.loads(config.to_json()), "buckets": 2048})
    with pytest.raises(Refused, match="buckets=2048"):
        open_state(tmp_path, other)
    assert list(open_state(tmp_path).topology().tables) == ["chats"]


def zoned(folder: Path, **options: Any) -> Config:
    loaded = load_config(None, data_dir=folder).model_copy(update={"namespace": "ns"})
    return Config.model_validate({**json.loads(loaded.to_json()), "zones": options})


def test_a_cluster_begins_only_where_all_its_nodes_have_a_place(tmp_path: Path) -> None:
    config = zoned(tmp_path, names=["a", "b", "c"])
    with pytest.raises(ConfigError, match="zone 'c'"):
        RouterState.open(tmp_path, "ns", config, [NodePlace("a"), NodePlace("b")])
    assert not (tmp_path / "router").exists(), "so the configuration can still be another one"
    state = RouterState.open(tmp_path, "ns", config, [NodePlace("a"), NodePlace("b"), NodePlace("c")])
    assert {node: place.zone for node, place in state.places.items() if node.startswith("storage")} == {
        "storage-0-0": "a",
        "storage-0-1": "b",
        "storage-0-2": "c",
    }


def test_a_node_stays_where_it_was_placed_across_restarts_and_changes(tmp_path: Path) -> None:
    config = zoned(tmp_path, names=["a", "b", "c"], host_label="host")
    machines = [NodePlace(zone, f"{zone}2") for zone in "abc"]
    first = RouterState.open(tmp_path, "ns", config, machines)
    assert first.places["storage-0-1"] == NodePlace("b", "b2")
    assert open_state(tmp_path).places == first.places
    more = [*machines, *(NodePlace(zone, f"{zone}1") for zone in "abcd")]
    renamed = zoned(tmp_path, names=["d", "c", "b", "a"], label="data-centre", host_label="host")
    assert RouterState.open(tmp_path, "ns", renamed, more).places == first.places
    caches = renamed.model_copy(update={"cache": renamed.cache.model_copy(update={"nodes": 2})})
    grown = RouterState.open(tmp_path, "ns", caches, more).places
    assert grown == {**first.places, "cache-0-1": NodePlace("c")}
    assert RouterState.open(tmp_path, "ns", zoned(tmp_path, names=list("abc")), []).places == grown


def test_reports_of_runs_are_bounded_and_checked(tmp_path: Path) -> None:
    state = open_state(tmp_path)
    for number in range(MAX_RUNS + 5):
        state.report_run({"run": f"r{number}", "state": "running", "done": 1})
        state.report_run({"run": f"r{number}", "state": "done", "done": 2})
    runs = open_state(tmp_path).runs
    assert [run["run"] for run in runs] == [f"r{number}" for number in range(5, MAX_RUNS + 5)]
    assert all(run["done"] == 2 for run in runs)
    bad: list[dict[str, Any]] = [
        {},
        {"run": 1, "state": "x"},
        {"run": "r", "state": "s", "x": "y" * 20_000},
        {"run": "r", "state": "s", "x": object()},
    ]
    for report in bad:
        with pytest.raises(InvalidRequest):
            state.report_run(report)


# ---------------------------------------------------------------- the actor


def start(namespace: str, folder: Path) -> Any:
    options: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1, "max_concurrency": 100}
    return (
        ray.remote(Router).options(name="router", namespace=namespace, **options).remote(namespace, str(folder), None)
    )


async def until(condition: Callable[[], Any], timeout_s: float = 30.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            found = await condition()
            if found:
                return found
        except Unavailable:
            if time.monotonic() > deadline:
                raise
        assert time.monotonic() < deadline, "not in time"
        await asyncio.sleep(0.05)


def test_followers_learn_a_change_at_once_and_go_on_after_the_router_was_killed(
    ray_session: None, namespace: str, tmp_path: Path
) -> None:
    router = start(namespace, tmp_path)

    async def body() -> None:
        link = RouterLink(namespace)
        first = await link.topology()
        seen: list[Topology] = []
        greeted: list[float] = []

        async def greet() -> None:
            greeted.append(time.monotonic())

        following = asyncio.create_task(link.follow(first.epoch, seen.append, greet))
        await until(lambda: _value(greeted))
        register = msgspec.msgpack.encode(Address("cache-0-0", tcp_port=5))
        started = time.monotonic()
        epoch = await link.call("register", register)
        await until(lambda: _value(seen))
        assert time.monotonic() - started < 5  # it was pushed: the poll itself would have lasted 22 s at least
        assert seen[0].epoch == epoch
        assert seen[0].addresses["cache-0-0"].tcp_port == 5

        pid = await _pid(namespace)
        os.kill(pid, signal.SIGKILL)
        second = RouterLink(namespace)
        again = await until(second.topology)
        assert again == seen[0]
        await second.call("register", msgspec.msgpack.encode(Address("cache-0-0", tcp_port=6)))
        await until(lambda: _value(len(seen) > 1))
        assert seen[-1].addresses["cache-0-0"].tcp_port == 6
        assert len(greeted) == 2
        following.cancel()

    asyncio.run(asyncio.wait_for(body(), 90))
    ray.kill(router)


def test_a_router_with_damaged_state_stays_up_and_refuses(ray_session: None, namespace: str, tmp_path: Path) -> None:
    open_state(tmp_path)
    (tmp_path / "router" / "state.json").write_bytes(b"{")
    router = start(namespace, tmp_path)

    async def body() -> None:
        link = RouterLink(namespace)
        assert "damaged" in (await link.call("hello", timeout_s=30))["reason"]
        assert (await link.call("status"))["state"] == "refused"
        for method, arguments in (("topology", (-1, 1.0)), ("may_format", ("cold-0-0",)), ("config", ())):
            with pytest.raises(TimeTierError, match="damaged"):
                await link.call(method, *arguments)

    asyncio.run(body())
    ray.kill(router)


async def _value(value: Any) -> Any:
    return value


async def _pid(namespace: str) -> int:
    return int((await RouterLink(namespace).call("status"))["pid"])


def test_what_a_full_disk_refused_is_not_taken_for_done_and_is_done_when_there_is_room(tmp_path: Path) -> None:
    """Else a node would vote on the word that its folder is noted as formatted, and a restarted Router not know."""
    with small_disk(tmp_path / "data", 1 << 20) as disk:
        state = open_state(disk.folder)
        assert state.may_format("storage-0-1")
        before = state.topology()
        with disk.refusing():
            for _ in range(2):
                with pytest.raises(Unavailable, match="free some space") as refused:
                    state.formatted("storage-0-1")
                assert refused.value.retry_after_s
                with pytest.raises(Unavailable):
                    state.register(Address("cache-0-0", tcp_port=1))
                with pytest.raises(Unavailable):
                    state.lift_epoch(41)
                with pytest.raises(Unavailable):
                    state.report_run({"run": "r", "state": "running"})
            assert state.topology() == before, "and it goes on telling what it knows"
            assert state.folders == open_state(disk.folder).folders == {"storage-0-1": "granted"}
        assert open_state(disk.folder).topology() == before
        state.formatted("storage-0-1")
        assert state.register(Address("cache-0-0", tcp_port=1))
        assert open_state(disk.folder).topology() == state.topology()
        assert open_state(disk.folder).folders == {"storage-0-1": "formatted"}


def test_a_router_with_too_many_long_polls_answers_everything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        monkeypatch.setattr(router_module, "MAX_POLLS", 3)
        router = Router("ns", str(tmp_path), None)
        epoch = msgspec.msgpack.decode(await router.topology(-1, 1.0), type=Topology).epoch  # type: ignore[arg-type]
        polls = [asyncio.create_task(router.topology(epoch, 30.0)) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Unavailable) as refused:
            await router.topology(epoch, 30.0)
        assert refused.value.retry_after_s
        assert await router.topology(-1, 1.0) is not None
        address = msgspec.msgpack.encode(Address("cache-0-0", tcp_port=1))
        assert await router.register(address) == epoch + 1
        assert all(await asyncio.gather(*polls))
        idle = asyncio.create_task(router.topology(epoch + 1, 30.0))
        await asyncio.sleep(0)
        assert not idle.done(), "their places are free again"
        idle.cancel()
        await router.stop()

    asyncio.run(body())
