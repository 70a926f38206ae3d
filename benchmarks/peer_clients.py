"""How the peers are spoken to: each by its usual Python client, in the way that is fastest for it.

Keys, and what is the same in every call, are made before the clock starts. Every face has the methods of
`timetier.jobs.bench_workloads.Subject`. The blocking faces are used by one caller at a time or by threads, the others
by asyncio.
"""

from __future__ import annotations

from typing import Any

import grpc
import redis
import redis.asyncio
from etcd3 import etcdrpc as rpc
from timetier.jobs.bench_data import Dataset

_REPLICAS_ACKNOWLEDGE = 1
_WAIT_MS = 5_000
_CALL_S = 30.0
_CONNECTIONS = 64
_GREATEST = (1 << 63) - 1


class _RedisFace:
    """What the blocking and the asyncio client share. Items are strings, timelines are sorted sets of values."""

    def key(self, owner: str, timestamp: int) -> str:
        return f"{owner}:{timestamp}"

    def write(self, owner: str, timestamp: int, value: bytes) -> tuple[str, bytes]:
        return f"{owner}:{timestamp}", value

    def values(self, answer: Any) -> list[bytes | None]:
        return answer if isinstance(answer, list) else [answer]

    def page_values(self, answer: Any) -> list[list[bytes]]:
        return answer if answer and isinstance(answer[0], list) else [answer]


class BlockingRedis(_RedisFace):
    blocking = True

    def __init__(self, **where: Any) -> None:
        self._redis = redis.Redis(**where, max_connections=_CONNECTIONS)
        self.get, self.get_many = self._redis.get, self._redis.mget

    def put(self, write: tuple[str, bytes]) -> None:
        with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.set(*write)
            pipeline.execute_command("WAIT", _REPLICAS_ACKNOWLEDGE, _WAIT_MS)
            _check_wait(pipeline.execute()[1])

    def put_many(self, writes: list[tuple[str, bytes]]) -> None:
        with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.mset(dict(writes))
            pipeline.execute_command("WAIT", _REPLICAS_ACKNOWLEDGE, _WAIT_MS)
            _check_wait(pipeline.execute()[1])

    def page(self, owner: str, limit: int) -> Any:
        return self._redis.zrange(owner, 0, limit - 1, desc=True)

    def pages(self, owners: list[str], limit: int) -> Any:
        with self._redis.pipeline(transaction=False) as pipeline:
            for owner in owners:
                pipeline.zrange(owner, 0, limit - 1, desc=True)
            return pipeline.execute()

    def load_pages(self, data: Dataset) -> None:
        """The same items as sorted sets, whose members begin with a stamp and so are distinct."""
        for batch in data.loads(2_000):
            with self._redis.pipeline(transaction=False) as pipeline:
                for owner, timestamp, value in batch:
                    pipeline.zadd(owner, {value: timestamp})
                pipeline.execute_command("WAIT", _REPLICAS_ACKNOWLEDGE, _WAIT_MS)
                _check_wait(pipeline.execute()[-1])

    def close(self) -> None:
        self._redis.close()


class AsyncRedis(_RedisFace):
    blocking = False

    def __init__(self, **where: Any) -> None:
        self._redis = redis.asyncio.Redis(**where, max_connections=_CONNECTIONS)
        self.get, self.get_many = self._redis.get, self._redis.mget

    async def put(self, write: tuple[str, bytes]) -> None:
        async with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.set(*write)
            pipeline.execute_command("WAIT", _REPLICAS_ACKNOWLEDGE, _WAIT_MS)
            _check_wait((await pipeline.execute())[1])

    async def put_many(self, writes: list[tuple[str, bytes]]) -> None:
        async with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.mset(dict(writes))
            pipeline.execute_command("WAIT", _REPLICAS_ACKNOWLEDGE, _WAIT_MS)
            _check_wait((await pipeline.execute())[1])

    async def page(self, owner: str, limit: int) -> Any:
        return await self._redis.zrange(owner, 0, limit - 1, desc=True)

    async def pages(self, owners: list[str], limit: int) -> Any:
        async with self._redis.pipeline(transaction=False) as pipeline:
            for owner in owners:
                pipeline.zrange(owner, 0, limit - 1, desc=True)
            return await pipeline.execute()

    async def close(self) -> None:
        await self._redis.aclose()


def _check_wait(acknowledged: int) -> None:
    if acknowledged < _REPLICAS_ACKNOWLEDGE:
        raise TimeoutError(f"Redis: no replica had the write within {_WAIT_MS} ms")


class _EtcdFace:
    """What both faces share. A key is owner, slash and the timestamp's distance from the greatest one: newest first.

    So a page is a plain range with a limit, which etcd answers without sorting.
    """

    def key(self, owner: str, timestamp: int) -> bytes:
        return f"{owner}/{_GREATEST - timestamp:016x}".encode()

    def write(self, owner: str, timestamp: int, value: bytes) -> tuple[bytes, bytes]:
        return self.key(owner, timestamp), value

    def values(self, answer: list[bytes | None]) -> list[bytes | None]:
        return answer

    def page_values(self, answer: list[list[bytes]]) -> list[list[bytes]]:
        return answer


def _range_of(owner: str, limit: int) -> Any:
    return rpc.RangeRequest(key=f"{owner}/".encode(), range_end=f"{owner}0".encode(), limit=limit)


def _reads(keys: list[bytes]) -> Any:
    return rpc.TxnRequest(success=[rpc.RequestOp(request_range=rpc.RangeRequest(key=key)) for key in keys])


def _writes(writes: list[tuple[bytes, bytes]]) -> Any:
    puts = [rpc.RequestOp(request_put=rpc.PutRequest(key=key, value=value)) for key, value in writes]
    return rpc.TxnRequest(success=puts)


def _pages(owners: list[str], limit: int) -> Any:
    return rpc.TxnRequest(success=[rpc.RequestOp(request_range=_range_of(owner, limit)) for owner in owners])


def _first(answer: Any) -> bytes | None:
    return answer.kvs[0].value if answer.kvs else None


def _firsts(answer: Any) -> list[bytes | None]:
    return [_first(one.response_range) for one in answer.responses]


def _all(answer: Any) -> list[bytes]:
    return [found.value for found in answer.kvs]


class BlockingEtcd(_EtcdFace):
    """By the stubs of python3-etcd3, without its wrappers, which would add to each call."""

    blocking = True

    def __init__(self, port: int) -> None:
        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        self._kv = rpc.KVStub(self._channel)

    def get(self, key: bytes) -> list[bytes | None]:
        return [_first(self._kv.Range(rpc.RangeRequest(key=key), timeout=_CALL_S))]

    def get_many(self, keys: list[bytes]) -> list[bytes | None]:
        return _firsts(self._kv.Txn(_reads(keys), timeout=_CALL_S))

    def put(self, write: tuple[bytes, bytes]) -> None:
        self._kv.Put(rpc.PutRequest(key=write[0], value=write[1]), timeout=_CALL_S)

    def put_many(self, writes: list[tuple[bytes, bytes]]) -> None:
        self._kv.Txn(_writes(writes), timeout=_CALL_S)

    def page(self, owner: str, limit: int) -> list[list[bytes]]:
        return [_all(self._kv.Range(_range_of(owner, limit), timeout=_CALL_S))]

    def pages(self, owners: list[str], limit: int) -> list[list[bytes]]:
        answer = self._kv.Txn(_pages(owners, limit), timeout=_CALL_S)
        return [_all(one.response_range) for one in answer.responses]

    def close(self) -> None:
        self._channel.close()


class AsyncEtcd(_EtcdFace):
    """By the same stubs on gRPC's asyncio."""

    blocking = False

    def __init__(self, port: int) -> None:
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        self._kv = rpc.KVStub(self._channel)

    async def get(self, key: bytes) -> list[bytes | None]:
        return [_first(await self._kv.Range(rpc.RangeRequest(key=key), timeout=_CALL_S))]

    async def get_many(self, keys: list[bytes]) -> list[bytes | None]:
        return _firsts(await self._kv.Txn(_reads(keys), timeout=_CALL_S))

    async def put(self, write: tuple[bytes, bytes]) -> None:
        await self._kv.Put(rpc.PutRequest(key=write[0], value=write[1]), timeout=_CALL_S)

    async def put_many(self, writes: list[tuple[bytes, bytes]]) -> None:
        await self._kv.Txn(_writes(writes), timeout=_CALL_S)

    async def page(self, owner: str, limit: int) -> list[list[bytes]]:
        return [_all(await self._kv.Range(_range_of(owner, limit), timeout=_CALL_S))]

    async def pages(self, owners: list[str], limit: int) -> list[list[bytes]]:
        answer = await self._kv.Txn(_pages(owners, limit), timeout=_CALL_S)
        return [_all(one.response_range) for one in answer.responses]

    async def close(self) -> None:
        await self._channel.close()
