"""Rows of Arrow's own files (`.arrow`, as `datasets` saves sets, and `.feather`), memory-mapped: of a large batch only
its rows at hand are in memory.

A file in a store is fetched to an unnamed one on disk first. The buffers of compressed batches are decompressed whole.
"""

import io
import mmap
import shutil
import tempfile
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from chimera.convert.read.columns import SMALL_BATCH, check_columns, columns_as_rows, select, unread
from chimera.convert.read.parsing import Dropped
from chimera.convert.read.reading import Position, Row, Span, Wanted
from chimera.limits import Limits

_MAGIC = b"ARROW1\0\0"  # begins a file that ends with an index of its batches; without it a file is a stream of them
_COPIED = 1 << 20  # bytes at a time


def arrow_names(_: str, file: BufferedReader, __: Limits) -> list[str]:
    """The columns of an open file, of which only the head is read."""
    import pyarrow as pa

    file.seek(0)
    head = file.read(len(_MAGIC))
    if head.startswith(b"FEA1"):
        raise ValueError("it is of the first version of Feather: write it again with pyarrow's or pandas' of today")
    file.seek(len(_MAGIC) if head == _MAGIC else 0)
    names: list[str] = pa.ipc.open_stream(file).schema.names
    return names


def arrow_rows(file: BufferedReader, span: Span, column: Wanted, start: Position, limits: Limits) -> Iterator[Row]:
    """The rows of an open file from `start` on. Raises `ValueError` for a damaged one."""
    names = arrow_names(span.file, file, limits)
    columns = check_columns(span.file, names, column)
    passed_over = unread(names, columns, column)
    number, begin = start.number, 0  # of the next row, and of the first of the batch at hand
    data = _mapped(file, limits.scratch)
    for batch in _batches(data, span.file, columns, limits):
        end = begin + batch.num_rows
        for piece in _pieces(batch.slice(number - begin)) if number < end else ():
            _check(data)
            for value in columns_as_rows(piece):
                raw = None if isinstance(value, Dropped) else value
                row = Row(value, raw, number, 0.0, Position(number + 1), unread=passed_over)
                del value, raw
                yield row
                number += 1
            data.madvise(mmap.MADV_DONTNEED)  # what was read need not stay in memory
        begin = end


def _mapped(file: BufferedReader, scratch: Path | None) -> mmap.mmap:
    """The bytes of an open file, of which the system keeps in memory what is used."""
    try:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except io.UnsupportedOperation:  # it lies in a store
        with tempfile.TemporaryFile(dir=scratch) as copy:
            file.seek(0)
            shutil.copyfileobj(file, copy, _COPIED)
            copy.flush()
            return mmap.mmap(copy.fileno(), 0, access=mmap.ACCESS_READ)


def _batches(data: mmap.mmap, name: str, columns: list[str], limits: Limits) -> Iterator[Any]:
    """The record batches of a file, of these columns."""
    import pyarrow as pa

    source = pa.py_buffer(data)
    indexed = data[: len(_MAGIC)] == _MAGIC
    names = (pa.ipc.open_file if indexed else pa.ipc.open_stream)(source).schema.names
    included = {names.index(column if column in names else column.partition(".")[0]) for column in columns}
    options = pa.ipc.IpcReadOptions(included_fields=sorted(included))
    if indexed:
        reader = pa.ipc.open_file(source, options=options)
        read = (reader.get_batch(number) for number in range(reader.num_record_batches))
    else:
        read = iter(pa.ipc.open_stream(source, options=options))
    remedy = "save the set again with smaller batches, uncompressed or as parquet"
    while True:
        with limits.held(f"{name}: a compressed record batch", remedy):
            batch = next(read, None)
        _check(data)
        if batch is None:
            return
        batch.cast(pa.schema([field.with_type(_bytes(field.type)) for field in batch.schema])).validate(full=True)
        yield select(batch, columns)


def _check(data: mmap.mmap) -> None:
    """Raise `EOFError` where the file has become shorter: what is gone reads as zeros, or ends the process."""
    if data.size() < len(data):
        raise EOFError("it has become shorter while it was read")


def _bytes(form: Any) -> Any:
    """An Arrow type with its strings as bytes where they lie, of which bad UTF-8 is no damage."""
    import pyarrow as pa

    kinds = pa.types
    if kinds.is_dictionary(form):
        return pa.dictionary(form.index_type, _bytes(form.value_type))
    if kinds.is_struct(form):
        return pa.struct([field.with_type(_bytes(field.type)) for field in form])
    if kinds.is_list(form) or kinds.is_large_list(form):
        of = pa.large_list if kinds.is_large_list(form) else pa.list_
        return of(form.value_field.with_type(_bytes(form.value_type)))
    same = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
    return same.get(form, form)


def _pieces(batch: Any) -> Iterator[Any]:
    """A batch in slices of about `SMALL_BATCH` bytes, if they are of more than one row."""
    step = max(1, batch.num_rows * SMALL_BATCH // max(1, batch.nbytes))
    return (batch.slice(at, step) for at in range(0, batch.num_rows, step))
