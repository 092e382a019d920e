"""Rows of parquet files from any row group and row on, read by pyarrow with as little in memory as it can.

It holds a page at a time, and its dictionary besides: about twice the bytes of either. (Arrow's own writer puts a
thousand rows into a page before it looks at its size: books of 400 kB make pages of 400 MB.)
"""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from io import BufferedReader
from typing import Any

from chimera.convert.read.columns import check_columns, columns_as_rows, select, unread
from chimera.convert.read.parsing import Dropped
from chimera.convert.read.reading import Position, Row, Span, Wanted
from chimera.limits import Limits, TooLarge

# Arrow's own allocator keeps what is freed (of a page of 400 MB: 190 MB), the system's does not; read when it loads.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")

BATCH_ROWS = 16  # decoded at a time,
MORE_ROWS = 64  # where they are of four kilobytes or less on average, in a row group of
SMALL_GROUP = 32 << 20  # bytes at most;
LONG_ROW = 16 << 10  # bytes: where rows are as long on average they are decoded one by one, and
LARGE_BATCH = 16 << 20  # bytes: after a batch as large as well
_BUFFER = 1 << 20  # bytes of a column read at a time
_END = 1 << 16  # bytes of a file that Arrow reads first, to find the footer
_IN_MEMORY = 5  # bytes for one of a footer: half of what Arrow takes at most, for which `Limits.check` allows twice
Held = Callable[[], AbstractContextManager[None]]


def open_parquet(name: str, file: BufferedReader, limits: Limits) -> Any:
    """A `pyarrow.parquet.ParquetFile` of an open file, called `name` in errors."""
    import pyarrow.parquet as pq

    file.seek(max(0, file.seek(0, os.SEEK_END) - _END))
    end = file.read(_END)
    if end.endswith(b"PAR1"):
        footer = int.from_bytes(end[-8:-4], "little")
        remedy = "write the file again with larger row groups or fewer columns"
        limits.check(f"{name}: its footer of {footer >> 20} MiB", _IN_MEMORY * footer, remedy)
    return pq.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True)


def parquet_names(name: str, file: BufferedReader, limits: Limits) -> list[str]:
    """The columns of an open file."""
    with open_parquet(name, file, limits) as parquet:
        names: list[str] = parquet.schema_arrow.names
    return names


def column_bytes(group: Any, columns: list[str]) -> int:
    """Of a row group's metadata: how much its pages of these columns hold, a dictionary's values once."""
    return sum(group.column(leaf).total_uncompressed_size for leaf in _leaves(group, columns))


def _leaves(group: Any, columns: list[str]) -> list[int]:
    """The numbers of a row group's column chunks that are of these columns, or within them."""
    paths = [group.column(leaf).path_in_schema for leaf in range(group.num_columns)]
    return [
        leaf for leaf, path in enumerate(paths) if any(path == name or path.startswith(f"{name}.") for name in columns)
    ]


def parquet_rows(file: BufferedReader, span: Span, column: Wanted, start: Position, limits: Limits) -> Iterator[Row]:
    """The rows of a span of an open file from `start` on; row groups before it are not read.

    Raises `ValueError` for a row group that gives other rows than the footer tells, and `TooLarge` for one of which
    Arrow must hold too much.
    """
    with open_parquet(span.file, file, limits) as parquet:
        meta = parquet.metadata
        names = parquet.schema_arrow.names
        columns = check_columns(span.file, names, column)
        passed_over = unread(names, columns, column)
        if expect := getattr(file.raw, "expect", None):  # a hub's file, which fetches ahead
            expect(*_ranges(meta, columns))
        groups = range(span.begin, meta.num_row_groups if span.end is None else span.end)
        first = sum(meta.row_group(g).num_rows for g in range(span.begin))
        share = span.bytes / max(1, sum(meta.row_group(g).num_rows for g in groups))
        passed = 0  # rows of the span before the group at hand
        for group in groups:
            in_group = meta.row_group(group).num_rows
            number = max(start.number, passed)
            skip = number - passed
            passed += in_group
            if passed <= number:
                continue
            for value in _rows_of_group(parquet, span.file, group, columns, skip, limits):
                raw = None if isinstance(value, Dropped) else value
                row = Row(value, raw, first + number, share, Position(number + 1), unread=passed_over)
                del value, raw
                yield row
                number += 1
            if number != passed:
                raise ValueError(f"of the {in_group} rows of row group {group} {passed - number} did not come")


def _ranges(meta: Any, columns: list[str]) -> tuple[list[tuple[int, int]], int]:
    """Where the pages of these columns lie, bytes [begin, end) of each chunk, and how many chunks a row group has."""
    groups = [meta.row_group(group) for group in range(meta.num_row_groups)]
    chunks = [group.column(leaf) for group in groups for leaf in _leaves(group, columns)]
    begins = [chunk.dictionary_page_offset or chunk.data_page_offset for chunk in chunks]
    ranges = [(begin, begin + chunk.total_compressed_size) for begin, chunk in zip(begins, chunks, strict=True)]
    return ranges, len(ranges) // max(1, len(groups))


def _rows_of_group(
    parquet: Any, name: str, group: int, columns: list[str], skip: int, limits: Limits
) -> Iterator[object]:
    meta = parquet.metadata.row_group(group)
    for leaf in _leaves(meta, columns):
        values, in_lists = meta.column(leaf).num_values, parquet.metadata.schema.column(leaf).max_repetition_level
        if values < meta.num_rows or (values > meta.num_rows and not in_lists):
            raise ValueError(f"a column of row group {group} has {values} values for {meta.num_rows} rows")
    size = column_bytes(meta, columns)
    what = f"{name}: row group {group} ({size >> 20} MiB of {', '.join(columns)})"
    held = functools.partial(limits.held, what, "write the file again with smaller row groups or pages")
    read = functools.partial(parquet.iter_batches, row_groups=[group], columns=columns, use_threads=False)
    rows = BATCH_ROWS if size < LONG_ROW * meta.num_rows else 1
    if size <= min(SMALL_GROUP, meta.num_rows << 12):
        rows = MORE_ROWS
    for batch in _batches(read, rows, skip, held):
        yield from columns_as_rows(select(batch, columns))  # of a column `a.b` a struct `a` with a field `b` comes too


def _batches(read: Callable[..., Iterator[Any]], rows: int, skip: int, held: Held) -> Iterator[Any]:
    """Batches (Arrow) of `rows` rows from row `skip` on; once one of them is large, batches of one row.

    `read(batch_size=n)` gives them from the start, each while `held()`. (Of equal large values the footer counts one.)
    """
    import pyarrow as pa

    for size in dict.fromkeys((rows, 1)):
        begin, batches = 0, read(batch_size=size)
        while True:
            try:
                with held():
                    batch = next(batches, None)
            except TooLarge:
                if size == 1:
                    raise
                break
            if batch is None:
                return
            end, large = begin + batch.num_rows, batch.nbytes > LARGE_BATCH
            if large:
                pa.default_memory_pool().release_unused()  # what reading it took, several times its size
            if end > skip:
                yield batch.slice(skip - begin) if skip > begin else batch
                skip = end
            begin = end
            if large and size > 1:
                break
