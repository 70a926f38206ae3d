"""Arrow IPC files put together from record batches that were encoded one by one.

Arrow's own writer wants the footer's metadata before the first batch, but ours has where each batch lies, and its
checksum. So each batch is encoded once, as a message by itself, and the file is: magic, schema message, the messages
as they are, end of stream, footer, magic (https://arrow.apache.org/docs/format/Columnar.html#ipc-file-format).

Only Arrow writes footers: it writes one for a file of as many empty batches, and the places of these, which are known
to the byte, are replaced by those of the real ones. They are structs of fixed size, so nothing else moves.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..errors import Corrupt

MAGIC = b"ARROW1\x00\x00"
COMPRESSION, LEVEL = "zstd", 3  # chosen by `python -m benchmarks.cold_encodings`, see docs/decisions/028
_OPTIONS = pa.ipc.IpcWriteOptions(compression=pa.Codec(COMPRESSION, LEVEL), use_threads=False)
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
_PREFIX_BYTES = 8  # of a message: continuation mark and length of what describes the body
_PLACE = np.dtype([("offset", "<i8"), ("metadata", "<i4"), ("_", "<i4"), ("body", "<i8")])  # `Block` of File.fbs


def message_of(batch: pa.RecordBatch, options: pa.ipc.IpcWriteOptions | None = None) -> bytes:
    """The encapsulated message of a batch: the same bytes in a stream and in a file. `options`: another encoding."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=options or _OPTIONS) as writer:
        writer.write_batch(batch)
        end = sink.tell()
    data: bytes = sink.getvalue()[len(batch.schema.serialize()) : end].to_pybytes()
    return data


def head_of(schema: pa.Schema) -> bytes:
    """What comes before the first batch."""
    message: bytes = schema.serialize().to_pybytes()
    return MAGIC + message


def tail_of(schema: pa.Schema, messages: Sequence[bytes], metadata: dict[bytes, bytes]) -> bytes:
    """What comes behind the last batch: end of stream and footer. `metadata`: of the footer.

    Raises Corrupt if Arrow's footer is not as expected, which a release of it might change.
    """
    sink = pa.BufferOutputStream()
    empty = pa.RecordBatch.from_pylist([], schema=schema)
    with pa.ipc.new_file(sink, schema, options=_OPTIONS, metadata=metadata) as writer:
        for _ in messages:
            writer.write_batch(empty)
    stub: bytes = sink.getvalue().to_pybytes()
    start = len(head_of(schema))
    if not messages:
        return stub[start:]
    lone = message_of(empty)
    end = start + len(lone) * len(messages)
    tail = stub[end:]
    was, real = _places(start, [lone] * len(messages)), _places(start, messages)
    if stub[start:end] != lone * len(messages) or not tail.startswith(_END_OF_STREAM) or tail.count(was) != 1:
        raise Corrupt(f"pyarrow {pa.__version__} writes files in a way that is not known here", reason="content")
    return tail.replace(was, real)


def _places(start: int, messages: Sequence[bytes]) -> bytes:
    """Where the footer says that messages lie which follow each other from `start` on."""
    lengths = np.fromiter(map(len, messages), dtype=np.int64, count=len(messages))
    places: npt.NDArray[np.void] = np.zeros(len(messages), dtype=_PLACE)
    places["metadata"] = [_PREFIX_BYTES + int.from_bytes(message[4:8], "little") for message in messages]
    places["offset"] = start + np.cumsum(lengths) - lengths
    places["body"] = lengths - places["metadata"]
    return places.tobytes()
