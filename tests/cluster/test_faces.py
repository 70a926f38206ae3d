"""The synchronous face: the same answers, from any thread, and an end that is clear."""

from __future__ import annotations

import asyncio
import doctest
import gc
import inspect
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timetier
from client_model import open_store
from timetier.cluster.client import faces
from timetier.cluster.client.faces import LoopThread, Store, Table
from timetier.cluster.client.store import AsyncStore, AsyncTable
from timetier.cluster.errors import InvalidRequest, OutcomeUnknown, Unavailable, VersionConflict
from timetier.cluster.messages import Message, ReadItems


class World:
    """A synchronous store over a model. `hang`: nodes stay silent while it is set."""

    def __init__(self) -> None:
        self.hang = False
        self.met = threading.Event()  # a message came while nodes hang
        self.store, self.model = open_store(self._fault)
        self.moments = self.store.table("moments")

    async def _fault(self, node: str, message: Message) -> Message | None:
        if self.hang:
            self.met.set()
            await asyncio.sleep(60)
        return None


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.store.close()


def client_threads() -> int:
    return sum(thread.name == "timetier-client" for thread in threading.enumerate())


def test_the_example_of_the_table_holds(world: World) -> None:
    finder, runner = (
        doctest.DocTestFinder(recurse=False),
        doctest.DocTestRunner(optionflags=doctest.IGNORE_EXCEPTION_DETAIL),
    )
    for test in finder.find(Table, "Table", globs={"moments": world.moments}):
        runner.run(test)
    assert runner.tries >= 7 and runner.failures == 0


def test_every_method_answers_as_its_asynchronous_twin(world: World) -> None:
    moments = world.moments
    assert (moments.name, moments.policy.per_second, repr(moments)) == ("moments", 1_000_000, "Table('moments')")
    assert moments.put("alice", 1, b"a", id="x") == 1
    assert moments.put_many([("alice", 2, b"b"), ("bob", 1, b"c")]) == [2, 1]
    item = moments.get("alice", 1, id=b"x")
    assert item is not None and (item.value, item.version) == (b"a", 1)
    assert moments.get_many([("alice", 2), ("alice", 9)])[1] is None
    assert [item.timestamp for item in moments.timeline("alice", limit=1).items] == [2]
    assert [len(page.items) for page in moments.timelines(["alice", "bob", "eve"])] == [2, 1, 0]
    assert [item.timestamp for item in moments.iterate("alice", limit_per_page=1)] == [2, 1]
    assert moments.delete("alice", 1, id="x") == 3
    assert moments.delete_many([("alice", 2), ("bob", 1)]) == [4, 2]
    assert moments.delete_timeline("alice") == 5
    assert world.store.status()["nodes"]["storage-0-0"] == {"state": "serving"}
    with pytest.raises(VersionConflict):
        moments.put("alice", 1, b"", if_version=0)


@pytest.mark.parametrize(("face", "twin"), [(Table, AsyncTable), (Store, AsyncStore)])
def test_both_faces_have_the_same_methods_arguments_and_docstrings(face: type, twin: type) -> None:
    inner = {"carrier", "view", "ray_dataset"}
    inner |= {"write_all", "write_one", "read_all_pages", "read_all_items", "read_item"}
    names = {name for name in vars(twin) if not name.startswith("_")} - inner
    assert names <= set(vars(face))
    for name in names:
        mine, theirs = getattr(face, name), getattr(twin, name)
        assert mine.__doc__ == theirs.__doc__ and mine.__doc__
        assert inspect.signature(mine).parameters == inspect.signature(theirs).parameters


def test_calls_of_many_threads_share_messages(world: World) -> None:
    owners = [f"owner{n}" for n in range(400)]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda owner: world.moments.put(owner, 1, owner.encode()), owners)) == [1] * 400
        items = list(pool.map(lambda owner: world.moments.get(owner, 1), owners))
    assert [item.value.decode() for item in items if item] == owners
    assert sum(len(m.timelines) for _, m in world.model.log if isinstance(m, ReadItems)) == 400
    assert world.model.entries() == 400


def test_an_interrupt_while_waiting_ends_the_call_and_the_store_goes_on(world: World) -> None:
    world.hang = True

    def interrupt() -> None:
        world.met.wait(10)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        world.moments.put("alice", 1, b"v")
    thread.join()
    world.hang = False
    assert world.moments.put("bob", 1, b"v") == 1


def test_a_closed_store_says_so_and_leaves_no_thread() -> None:
    before = client_threads()
    world = World()
    assert client_threads() == before + 1
    with world.store as store:
        world.moments.put("alice", 1, b"v")
    assert client_threads() == before
    for call in (lambda: world.moments.get("alice", 1), store.status, lambda: store.table("moments")):
        with pytest.raises(InvalidRequest, match="closed"):
            call()
    store.close()


def test_closing_ends_calls_of_other_threads() -> None:
    world = World()
    world.hang = True
    with ThreadPoolExecutor(2) as pool:
        write = pool.submit(world.moments.put, "alice", 1, b"v")
        read = pool.submit(world.moments.get, "alice", 1)
        assert world.met.wait(10)
        while world.store._store._items.figures()["batches_in_flight"] == 0:
            assert not read.done()
        world.store.close()
        assert isinstance(write.exception(10), OutcomeUnknown)
        assert isinstance(read.exception(10), (Unavailable, OutcomeUnknown))


def test_a_store_that_nobody_holds_ends_by_itself() -> None:
    before = client_threads()
    moments = open_store()[0].table("moments")
    gc.collect()
    assert moments.put("alice", 1, b"v") == 1, "a table keeps its store"
    del moments
    deadline = time.monotonic() + 5
    while client_threads() > before:
        assert time.monotonic() < deadline, "the thread outlived its store"
        gc.collect()


def test_a_failed_connect_leaves_no_thread() -> None:
    before = client_threads()

    async def fail() -> AsyncStore:
        raise Unavailable("no cluster here")

    with pytest.raises(Unavailable, match="no cluster here"):
        Store.open(fail)
    assert client_threads() == before


def test_a_forked_child_is_told_to_connect_again(world: World) -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:  # the child: whatever happens here, it must end without pytest's own ending
        text = "no error"
        try:
            world.moments.put("alice", 1, b"v")
        except InvalidRequest as error:
            world.store.close()
            text = str(error)
        finally:
            os.write(writer, text.encode())
            os._exit(0)
    os.waitpid(pid, 0)
    assert "connect again after a fork" in os.read(reader, 1000).decode()
    os.close(reader)
    os.close(writer)
    assert world.moments.put("alice", 1, b"v") == 1


def test_a_call_from_the_stores_own_thread_is_an_error_and_no_deadlock(world: World) -> None:
    async def inside() -> None:
        world.moments.put("alice", 1, b"v")

    with pytest.raises(InvalidRequest, match="connect_async"):
        world.store.run(inside())


def test_calls_work_inside_a_running_event_loop(world: World) -> None:
    async def inside() -> int:
        return world.moments.put("alice", 1, b"v")

    assert asyncio.run(inside()) == 1


def test_a_thread_that_stops_ends_what_runs_on_it() -> None:
    thread = LoopThread()
    started = threading.Event()

    async def wait() -> None:
        started.set()
        await asyncio.sleep(60)

    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(thread.run, wait())
        assert started.wait(10)
        thread.stop()
        assert isinstance(call.exception(10), OutcomeUnknown)
    thread.stop()


def test_a_process_that_forgets_to_close_ends_cleanly() -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import client_model\n"
        "store, model = client_model.open_store()\n"
        "print(store.table('moments').put('alice', 1, b'v'))\n"
    )
    tests = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", program, str(tests)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def test_importing_the_package_does_not_import_ray() -> None:
    program = "import sys, timetier; print('ray' in sys.modules, timetier.connect.__name__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False connect\n", done.stderr


def test_the_public_face_is_complete() -> None:
    for name in timetier.__all__:
        assert getattr(timetier, name) is not None
    assert timetier.Table is faces.Table
