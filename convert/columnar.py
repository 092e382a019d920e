"""Rows of parquet files by column and row group, and of Arrow's batches, with no more in memory than must be."""

import functools
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

from convert.documents import MOST_VALUES, Dropped
from convert.reading import LONGEST_LINE, Position, Row, Span

# Arrow's own allocator keeps what is freed (of a page of 400 MB: 190 MB), the system's does not; read when it loads.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")

BATCH_ROWS = 16  # decoded at a time by Arrow,
LONG_ROW = 16 << 10  # bytes: where rows are as long on average they are decoded one by one, and
LARGE_BATCH = 16 << 20  # bytes: after a batch as large as well
_BUFFER = 1 << 20  # bytes of a parquet column read at a time
_CHAT_COLUMNS = ("messages", "instruction", "input", "output")


def conversation_columns(names: list[str]) -> list[str]:
    """The columns a conversation can be read from, among `names`; empty when they do not suffice."""
    found = [name for name in _CHAT_COLUMNS if name in names]
    return found if "messages" in found or {"instruction", "output"} <= set(found) else []


def open_parquet(file: Any) -> Any:
    """A `pyarrow.parquet.ParquetFile` (of a path or an open file) that holds no more of a file than it must."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False)


def column_bytes(group: Any, columns: list[str]) -> int:
    """Of a row group's metadata: how much its pages of these columns hold, a dictionary's values once."""
    return sum(chunk.total_uncompressed_size for chunk in _chunks(group, columns))


def column_ranges(meta: Any, columns: list[str]) -> list[tuple[int, int]]:
    """Of a file's metadata: where the pages of these columns lie, bytes [begin, end) of each row group's chunks."""
    chunks = [chunk for group in range(meta.num_row_groups) for chunk in _chunks(meta.row_group(group), columns)]
    begins = [chunk.dictionary_page_offset or chunk.data_page_offset for chunk in chunks]
    return [(begin, begin + chunk.total_compressed_size) for begin, chunk in zip(begins, chunks, strict=True)]


def _chunks(group: Any, columns: list[str]) -> list[Any]:
    chunks = map(group.column, range(group.num_columns))
    return [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns]


def parquet_rows(file: Any, span: Span, columns: list[str], start: Position) -> Iterator[Row]:
    """The rows of a span of an open parquet file from `start` on; row groups before it are not read."""
    meta = file.metadata
    groups = range(span.begin, meta.num_row_groups if span.end is None else span.end)
    first = sum(meta.row_group(g).num_rows for g in range(span.begin))
    share = span.bytes / max(1, sum(meta.row_group(g).num_rows for g in groups))
    passed = 0  # rows of the span before the group at hand
    for group in groups:
        in_group = meta.row_group(group).num_rows
        number = max(start.number, passed)
        passed += in_group
        if passed <= number:
            continue
        read = functools.partial(file.iter_batches, row_groups=[group], columns=columns, use_threads=False)
        size = column_bytes(meta.row_group(group), columns) // in_group
        if size < LONG_ROW:  # as it seems: of equal values the dictionary holds one
            size = max(batch.nbytes for batch in itertools.islice(read(batch_size=1), 1))
        for batch in bounded(read, BATCH_ROWS if size < LONG_ROW else 1, number - passed + in_group):
            for value in columns_as_rows(batch):
                raw = None if isinstance(value, Dropped) else value
                row = Row(value, raw, first + number, share, Position(number + 1))
                del value, raw
                yield row
                number += 1


def bounded(read: Callable[..., Iterator[Any]], rows: int, skip: int) -> Iterator[Any]:
    """Batches (Arrow) of `rows` rows from row `skip` on; once one of them is large, batches of one row.

    `read(batch_size=n)` gives them from the start.
    """
    import pyarrow as pa

    for size in dict.fromkeys((rows, 1)):
        begin = 0
        for batch in read(batch_size=size):
            end = begin + batch.num_rows
            if batch.nbytes > LARGE_BATCH:
                pa.default_memory_pool().release_unused()  # what reading it took, several times its size
            if end > skip:
                yield batch.slice(skip - begin) if skip > begin else batch
                skip = end
            begin = end
            if size > 1 and batch.nbytes > LARGE_BATCH:
                break
        else:
            return


def columns_as_rows(batch: Any) -> Iterator[object]:
    """The rows of an Arrow batch as mappings; text stays bytes, so that one row of bad UTF-8 costs one row."""
    import pyarrow as pa

    if batch.num_columns == 1 and pa.types.is_string(batch.schema.field(0).type):
        batch = batch.cast(pa.schema([pa.field(batch.schema.names[0], pa.binary())]))
    elif batch.num_columns == 1 and pa.types.is_large_string(batch.schema.field(0).type):
        batch = batch.cast(pa.schema([pa.field(batch.schema.names[0], pa.large_binary())]))
    nested = [name for name in batch.schema.names if pa.types.is_nested(batch.schema.field(name).type)]
    for i in range(batch.num_rows):
        if batch.nbytes > LONGEST_LINE and batch.slice(i, 1).nbytes > LONGEST_LINE:
            yield Dropped("rejected", "row_too_long")
            continue
        if any(_values(batch.column(name).slice(i, 1)) > MOST_VALUES for name in nested):
            yield Dropped("rejected", "too_many_values")
            continue
        try:
            yield {name: batch.column(name)[i].as_py() for name in batch.schema.names}
        except UnicodeDecodeError:
            yield Dropped("rejected", "invalid_utf8")


def _values(column: Any) -> int:
    """How many values, lists and structs an Arrow array holds at all depths."""
    import pyarrow as pa

    if pa.types.is_struct(column.type):
        return len(column) + sum(map(_values, column.flatten()))
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return len(column) + _values(column.flatten())
    return len(column)
