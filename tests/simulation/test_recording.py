"""What a recorded table takes down is what its callers saw."""

from __future__ import annotations

import asyncio
import time

import pytest
from client_model import FixedSource, ModelStore, make_topology
from timetier.cluster.client.items import Put
from timetier.cluster.client.store import AsyncStore
from timetier.cluster.client.view import ClientSettings
from timetier.cluster.errors import OutcomeUnknown, Unavailable, VersionConflict, WriteManyError
from timetier.cluster.messages import UNKNOWN, Message, ReadPages, Write, Written, pack_i64

from .history import Conflict, Done, Item, Page, Recorder, Refused, Unknown
from .linearizability import check_history
from .recording import RecordedTable

HASTY = ClientSettings(timeout_s=0.2, attempt_timeout_s=0.1, back_off_s=0.001, back_off_max_s=0.01)


def open_table(model: ModelStore, recorder: Recorder) -> RecordedTable:
    """A table over the model's network."""
    store = AsyncStore(model.network.carrier("client"), make_topology(), FixedSource(), settings=HASTY)
    return RecordedTable(store.table("moments"), recorder, "a")


def test_results_are_taken_down_and_linearizable() -> None:
    async def run() -> None:
        recorder = Recorder(time.monotonic)
        table = open_table(ModelStore(make_topology()), recorder)
        await table.put("alice", 1, b"one")
        await table.put_many([Put("alice", 2, b"two"), Put("bob", 1, b"uno"), Put("alice", 3, b"three", b"id")])
        assert await table.get("alice", 3, id="id") is not None
        assert await table.get("alice", 9) is None
        page = await table.timeline("alice", limit=2)
        await table.timeline("alice", limit=2, before=page.next)
        with pytest.raises(VersionConflict):
            await table.put("alice", 1, b"other", if_version=7)
        await table.delete("alice", 2, if_version=2)
        await table.delete_timeline("bob")
        await table.timeline("bob")
        report = check_history(recorder.operations)
        assert report.ok, report.violations
        assert {operation.timeline for operation in recorder.operations} == {"moments/alice", "moments/bob"}
        kinds = [type(operation.result) for operation in recorder.operations]
        assert kinds == [Done, Done, Done, Item, Item, Page, Page, Conflict, Done, Done, Page]
        await table.table.store.close()

    asyncio.run(run())


def test_a_wrong_answer_of_the_store_is_found() -> None:
    async def run() -> None:
        model, recorder = ModelStore(make_topology()), Recorder(time.monotonic)
        table = open_table(model, recorder)
        for value in (b"one", b"two"):
            await table.put("alice", 1, value)
        (timeline,) = model.timelines.values()
        timeline.items = {key: (b"one", 1, written_us) for key, (_, _, written_us) in timeline.items.items()}
        await table.get("alice", 1)
        assert not check_history(recorder.operations).ok
        await table.table.store.close()

    asyncio.run(run())


def test_errors_are_taken_down_as_what_they_allow() -> None:
    """Unavailable: not applied. Anything else but an answer: unknown, a cancelled call too."""

    async def silent(_: str, message: Message) -> Message | None:
        if isinstance(message, Write):
            return Written(bytes([UNKNOWN]) * len(message.timelines), pack_i64([0] * len(message.timelines)))
        if isinstance(message, ReadPages):
            await asyncio.sleep(60)
        return None

    async def run() -> None:
        model, recorder = ModelStore(make_topology()), Recorder(time.monotonic)
        table = open_table(model, recorder)
        model.fault = silent
        with pytest.raises(OutcomeUnknown):
            await table.put("alice", 1, b"one")
        with pytest.raises(WriteManyError):
            await table.put_many([Put("alice", 1, b"two")])
        with pytest.raises(Unavailable):
            await table.timeline("alice")
        task = asyncio.create_task(table.delete_timeline("alice"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for node in make_topology().node_names():
            model.network.kill(node)
        with pytest.raises(Unavailable):
            await table.put("alice", 1, b"three")
        kinds = [type(operation.result) for operation in recorder.operations]
        assert kinds == [Unknown, Unknown, Refused, Unknown, Refused]
        assert [op.returned_at is None for op in recorder.operations] == [True, True, False, True, False]
        await table.table.store.close()

    asyncio.run(run())
