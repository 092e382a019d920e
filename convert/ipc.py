"""Rows of Arrow's own files (`.arrow`, as `datasets` saves sets).

Arrow reads a record batch whole, and a batch may hold a whole set. Its header tells where the values of each column
lie: those of a large batch are read some rows at a time, and a batch that is not wanted is passed over.

The format: https://arrow.apache.org/docs/format/Columnar.html (IPC); its headers are flatbuffers, described in
https://github.com/apache/arrow/blob/main/format/Message.fbs.
"""

import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from chimera.cli import UserError
from convert.columnar import columns_as_rows
from convert.documents import MOST_VALUES, Dropped
from convert.reading import LONGEST_LINE
from convert.shards import Array

ARROW_BYTES = 64 << 20  # of a batch, with what its compressed buffers hold: up to this it is read whole
AT_ONCE = 1 << 20  # bytes of a larger batch read at a time, if they are of more than one row
_MAGIC = b"ARROW1\0\0"  # before the stream in a file that ends with an index
_BATCH = 3  # a message's type: a record batch


_Place = tuple[int, int]  # where in the file a buffer begins, and its bytes


class _Message(NamedTuple):
    type: int
    rows: int  # of a record batch
    bytes: int  # of memory
    buffers: list[_Place] | None  # `None`: compressed
    end: int  # where in the file the next message begins


class _TooMuch(Exception):
    """Raised where rows hold more than may be read; the reason for which a single row is rejected."""


def open_arrow(file: BinaryIO) -> Any:
    """A `RecordBatchStreamReader` of an open file."""
    import pyarrow as pa

    file.seek(0)
    file.seek(len(_MAGIC) if file.read(len(_MAGIC)) == _MAGIC else 0)
    return pa.ipc.open_stream(file)


def arrow_rows(
    name: str, file: BinaryIO, reader: Any, columns: list[str], skip: int, expect: Callable[[list[_Place], int], None]
) -> Iterator[object]:
    """The rows of an open file from row `skip` on, as `columns_as_rows` gives them; `reader` is what has opened it.

    `expect` is told the bytes [begin, end) that are read next, as `HubFile.expect` wants it. Raises `UserError` naming
    the file (`name`) for a batch that takes more memory than a worker has.
    """
    while True:
        at, size = file.tell(), 0
        message = _message(file)
        if message is not None and message.type == _BATCH and message.rows <= skip:
            skip -= message.rows
            file.seek(message.end)
            continue
        while message is not None and message.type != _BATCH:  # dictionaries of the batch behind them
            size += message.bytes
            file.seek(message.end)
            message = _message(file)
        if message is None:
            return
        if size + message.bytes <= ARROW_BYTES:
            file.seek(at)
            yield from columns_as_rows(reader.read_next_batch().select(columns).slice(skip))
        else:
            try:
                pieces = _Pieces(file, reader.schema, message, columns)
            except ValueError as error:
                raise UserError(
                    f"{name}: a record batch of {size + message.bytes >> 20} MiB is too large for a worker's memory "
                    f"and cannot be read in pieces ({error}): save the set again with smaller batches, or as parquet"
                ) from None
            expect(pieces.ranges, len(pieces.ranges))
            yield from pieces.rows(skip)
            expect([(message.end, sys.maxsize)], 1)
            file.seek(message.end)
        skip = max(0, skip - message.rows)


class _Pieces:
    """A record batch in a file, of which some rows at a time are read. Raises `ValueError` where that cannot be."""

    def __init__(self, file: BinaryIO, schema: Any, message: _Message, columns: list[str]) -> None:
        if message.buffers is None:
            raise ValueError("it is compressed")
        self._file, self._count = file, message.rows
        found: dict[str, tuple[Any, list[_Place]]] = {}
        at = 0
        for field in schema:
            count = _buffers(field.type)
            if field.name in columns:
                found[field.name] = field.type, message.buffers[at : at + count]
            at += count
        self._names, self._columns = columns, [found[name] for name in columns]
        self.ranges = [(at, at + size) for _, places in self._columns for at, size in places if size]
        self._bytes = sum(end - begin for begin, end in self.ranges)
        self._left = 0

    def rows(self, begin: int) -> Iterator[object]:
        step = max(1, self._count * AT_ONCE // max(1, self._bytes))
        for at in range(begin, self._count, step):
            yield from self._rows(at, min(at + step, self._count))

    def _rows(self, begin: int, end: int) -> Iterator[object]:
        try:
            yield from columns_as_rows(self._batch(begin, end))
            return
        except _TooMuch as error:
            reason = str(error)
        if end - begin == 1:
            yield Dropped("rejected", reason)
            return
        middle = (begin + end) // 2
        yield from self._rows(begin, middle)
        yield from self._rows(middle, end)

    def _batch(self, begin: int, end: int) -> Any:
        import pyarrow as pa

        self._left = LONGEST_LINE if end - begin == 1 else 2 * AT_ONCE
        arrays = [self._array(form, begin, end, iter(places)) for form, places in self._columns]
        return pa.RecordBatch.from_arrays(arrays, self._names)

    def _array(self, form: Any, begin: int, end: int, places: Iterator["_Place"]) -> Any:
        """The values [begin, end) of an array whose buffers lie at `places`."""
        import pyarrow as pa

        if pa.types.is_null(form):
            return pa.nulls(end - begin)
        if end - begin > MOST_VALUES:
            raise _TooMuch("too_many_values")
        valid, children = self._bits(next(places), begin, end), []
        if pa.types.is_struct(form):
            buffers = [valid]
            children = [self._array(inner.type, begin, end, places) for inner in form]
        elif pa.types.is_boolean(form):
            buffers = [valid, self._bits(next(places), begin, end)]
        elif width := _width(form):
            buffers = [valid, self._read(next(places), begin * width, end * width)]
        else:
            large = pa.types.is_large_list(form) or pa.types.is_large_string(form) or pa.types.is_large_binary(form)
            offsets: Array = np.zeros(1, np.int64 if large else np.int32)
            place = next(places)
            if end > begin:
                size = offsets.itemsize
                offsets = np.frombuffer(self._read(place, begin * size, (end + 1) * size), offsets.dtype)
            first, last = int(offsets[0]), int(offsets[-1])
            buffers = [valid, pa.py_buffer(offsets - first)]
            if hasattr(form, "value_type"):
                children = [self._array(form.value_type, first, last, places)]
            else:
                buffers.append(self._read(next(places), first, last))
        return pa.Array.from_buffers(form, end - begin, buffers, children=children)

    def _bits(self, place: "_Place", begin: int, end: int) -> Any:
        """A bit for each value; `None` where all are valid."""
        import pyarrow as pa

        if not place[1]:
            return None
        data = np.frombuffer(self._read(place, begin // 8, (end + 7) // 8), np.uint8)
        bits = np.unpackbits(data, bitorder="little")[begin % 8 :][: end - begin]
        return pa.py_buffer(np.packbits(bits, bitorder="little"))

    def _read(self, place: "_Place", begin: int, end: int) -> Any:
        import pyarrow as pa

        at, size = place
        if not 0 <= begin <= end <= size:
            raise ValueError("its record batch is damaged")
        self._left -= end - begin
        if self._left < 0:
            raise _TooMuch("row_too_long")
        self._file.seek(at + begin)
        data = self._file.read(end - begin)
        if len(data) < end - begin:
            raise EOFError("its record batch is cut off")
        return pa.py_buffer(data)


def _width(form: Any) -> int:
    """Bytes of a value of a type whose values are all as long; 0 for another type."""
    import pyarrow as pa

    if pa.types.is_nested(form) or pa.types.is_dictionary(form) or pa.types.is_boolean(form):
        return 0
    try:
        return int(form.bit_width) // 8
    except ValueError:
        return 0


def _buffers(form: Any) -> int:
    """How many buffers an array of a type has. Raises `ValueError` for a type that is not known here."""
    import pyarrow as pa

    kinds = pa.types
    if kinds.is_null(form):
        return 0
    if kinds.is_struct(form):
        return 1 + sum(_buffers(inner.type) for inner in form)
    if kinds.is_list(form) or kinds.is_large_list(form):
        return 2 + _buffers(form.value_type)
    if kinds.is_string(form) or kinds.is_binary(form) or kinds.is_large_string(form) or kinds.is_large_binary(form):
        return 3
    if kinds.is_boolean(form) or _width(form):
        return 2
    raise ValueError(f"it has values of type {form}")


def _message(file: BinaryIO) -> _Message | None:
    """The message at the present place, of which the header is read; `None` at the end."""
    head = file.read(4)
    if head == b"\xff\xff\xff\xff":  # since version 0.15
        head = file.read(4)
    size = int.from_bytes(head, "little")
    if not size:
        return None
    header = file.read(size)
    body = file.tell()
    try:
        message = _Table(header, *struct.unpack_from("<I", header))
        type_, length = message.number(1, "B"), message.number(3, "q")
        batch = message.table(2) if type_ == _BATCH else message.table(2).table(1)
        rows, compressed = batch.number(0, "q"), batch.has(3)
        places = [(body + at, size) for at, size in struct.iter_unpack("<qq", batch.structs(2, 16))]
        if length < 0:
            raise struct.error
    except struct.error:
        raise ValueError(f"there is no header of a message at byte {body - size}") from None
    memory = length
    for at, stored in places if compressed else ():
        file.seek(at)
        plain = int.from_bytes(file.read(8)[:stored], "little", signed=True)
        memory += max(plain, 0)  # -1: it is stored as it is
    file.seek(body)
    return _Message(type_, rows, memory, None if compressed else places, body + length)


class _Table:
    """A flatbuffer's table; its fields are numbered as they are declared."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data, self._at = data, at

    def has(self, field: int) -> bool:
        return self._field(field) is not None

    def number(self, field: int, form: str) -> int:
        return self._read(form, at) if (at := self._field(field)) is not None else 0

    def table(self, field: int) -> "_Table":
        return _Table(self._data, self._behind(field))

    def structs(self, field: int, size: int) -> bytes:
        """The bytes of a vector of structs."""
        at = self._behind(field)
        return self._data[at + 4 : at + 4 + size * self._read("I", at)]

    def _behind(self, field: int) -> int:
        """Where a table or vector begins."""
        if (at := self._field(field)) is None:
            raise struct.error(f"field {field} is missing")
        return at + self._read("I", at)

    def _field(self, field: int) -> int | None:
        fields = self._at - self._read("i", self._at)
        known = (self._read("H", fields) - 4) // 2
        offset = self._read("H", fields + 4 + 2 * field) if field < known else 0
        return self._at + offset if offset else None

    def _read(self, form: str, at: int) -> int:
        number: int = struct.unpack_from("<" + form, self._data, at)[0]
        return number
