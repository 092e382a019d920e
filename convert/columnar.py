"""Rows of parquet files by column and row group, and of Arrow's batches, with no more in memory than must be.

Arrow reads a parquet page whole and a dictionary twice. Row groups of up to `ARROW_BYTES` are its, whatever their
pages; larger ones are streamed (`streamed.py`), and what cannot be is Arrow's if its pages are small, or refused.
"""

import functools
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from chimera.cli import UserError
from convert.documents import MOST_VALUES, Dropped
from convert.page_bytes import Unknown
from convert.pages import is_of, largest_page
from convert.reading import LONGEST_LINE, Position, Row, Span
from convert.streamed import streamed_rows

# Arrow's own allocator keeps what is freed (of a page of 400 MB: 190 MB), the system's does not; read when it loads.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")

BATCH_ROWS = 16  # decoded at a time by Arrow,
LONG_ROW = 16 << 10  # bytes: where rows are as long on average they are decoded one by one, and
LARGE_BATCH = 16 << 20  # bytes: after a batch as large as well
SMALL_BATCH = 1 << 20  # bytes: its rows may be in memory together, which takes a third of the time
ARROW_BYTES = 64 << 20  # of a row group's columns: with more, it could need more memory than a worker has
LARGEST_FOOTER = 32 << 20  # bytes: Arrow takes up to ten times as much for what a footer says
_BUFFER = 1 << 20  # bytes of a parquet column read at a time
_END = 1 << 16  # bytes of a file that Arrow reads first, to find the footer
_CHAT_COLUMNS = ("messages", "instruction", "input", "output")
_MESSAGE_FIELDS = ("role", "content")


def conversation_columns(names: list[str]) -> list[str]:
    """The columns a conversation can be read from, among `names`; empty when they do not suffice."""
    found = [name for name in _CHAT_COLUMNS if name in names]
    return found if "messages" in found or {"instruction", "output"} <= set(found) else []


def open_parquet(name: str, file: BinaryIO) -> Any:
    """A `pyarrow.parquet.ParquetFile` of an open file that holds no more of it than it must.

    Raises `UserError` naming the file (`name`) where its footer alone takes more memory than a worker has.
    """
    import pyarrow.parquet as pq

    file.seek(max(0, file.seek(0, os.SEEK_END) - _END))
    end = file.read(_END)
    footer = int.from_bytes(end[-8:-4], "little")
    if end.endswith(b"PAR1") and footer > LARGEST_FOOTER:
        raise UserError(
            f"{name}: its footer of {footer >> 20} MiB is too large for a worker's memory: write the file again with "
            "larger row groups or fewer columns"
        )
    return pq.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True)


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
    return [chunk for chunk in chunks if any(is_of(chunk.path_in_schema, column) for column in columns)]


def parquet_rows(
    parquet: Any, file: BinaryIO, span: Span, columns: list[str], start: Position, scratch: Path | None
) -> Iterator[Row]:
    """The rows of a span of a parquet file from `start` on; row groups before it are not read.

    `parquet` is the `ParquetFile` of the open `file`, `scratch` the folder for what must be kept meanwhile (`None`:
    the system's). Raises `UserError` for a row group that takes more memory than a worker has.
    """
    meta = parquet.metadata
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
        if column_bytes(meta.row_group(group), columns) <= ARROW_BYTES:
            values = _rows_of_small_group(parquet, file, group, columns, skip, scratch)
        else:
            values = _rows_of_large_group(parquet, file, span.file, group, columns, skip, scratch)
        for value in values:
            raw = None if isinstance(value, Dropped) else value
            row = Row(value, raw, first + number, share, Position(number + 1))
            del value, raw
            yield row
            number += 1
        if number != passed:
            raise ValueError(f"of the {in_group} rows of row group {group} {passed - number} did not come")


def _rows_of_group(parquet: Any, group: int, columns: list[str], skip: int) -> Iterator[object]:
    meta = parquet.metadata.row_group(group)
    read = functools.partial(parquet.iter_batches, row_groups=[group], columns=columns, use_threads=False)
    size = column_bytes(meta, columns) // meta.num_rows
    if size < LONG_ROW:  # as it seems: of equal values the dictionary holds one
        size = next((batch.nbytes for batch in read(batch_size=1)), 0)
    for batch in bounded(read, BATCH_ROWS if size < LONG_ROW else 1, skip):
        yield from columns_as_rows(batch.select(columns))  # of a column `a.b` a struct `a` with a field `b` comes too


def _rows_of_small_group(
    parquet: Any, file: BinaryIO, group: int, columns: list[str], skip: int, scratch: Path | None
) -> Iterator[object]:
    none_came = skip == 0
    for row in _rows_of_group(parquet, group, columns, skip):
        none_came, held = False, [row]
        del row
        yield held.pop()
    if none_came:  # pyarrow 25 passes over a row group's only row where a list of it fills the page to its limit
        yield from streamed_rows(file, parquet, group, columns, skip, scratch)


def _rows_of_large_group(
    parquet: Any, file: BinaryIO, name: str, group: int, columns: list[str], skip: int, scratch: Path | None
) -> Iterator[object]:
    rows = itertools.count(skip)  # the next one's number
    try:
        yield from map(lambda row, _: row, streamed_rows(file, parquet, group, columns, skip, scratch), rows)
        return
    except Unknown as error:
        unknown = error
    largest = sum(largest_page(file, chunk) for chunk in _chunks(parquet.metadata.row_group(group), columns))
    if largest > ARROW_BYTES:
        raise UserError(
            f"{name}: row group {group} has pages of {largest >> 20} MiB, too large for a worker's memory, and they "
            f"cannot be read in pieces ({unknown}): write the file again with smaller row groups"
        )
    yield from _rows_of_group(parquet, group, columns, next(rows))


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
    """The rows of an Arrow batch: mappings, or `Dropped`.

    Text is bytes in them, so that bad UTF-8 costs one row and one wide character not 4 bytes for each.
    """
    import pyarrow as pa

    schema = pa.schema([pa.field(field.name, _as_binary(field.type)) for field in batch.schema])
    nested = [field.name for field in schema if pa.types.is_nested(field.type)]
    shared = any(_shares(field.type) for field in batch.schema)
    batch = batch if shared else batch.cast(schema)
    if batch.nbytes <= SMALL_BATCH and not shared and all(map(_is_bytes, schema.types)):
        yield from batch.to_pylist()
        return
    count = batch.num_rows
    for i in range(count):
        row = [_row(batch.slice(i, 1).cast(schema), 0, nested) if shared else _row(batch, i, nested)]
        if i == count - 1:
            del batch  # which may be of one row: not to hold it twice
        yield row.pop()


def _row(batch: Any, i: int, nested: list[str]) -> object:
    if batch.nbytes > LONGEST_LINE and batch.slice(i, 1).nbytes > LONGEST_LINE:
        return Dropped("rejected", "row_too_long")
    if any(_values(batch.column(name).slice(i, 1)) > MOST_VALUES for name in nested):
        return Dropped("rejected", "too_many_values")
    try:
        return {name: batch.column(name)[i].as_py() for name in batch.schema.names}
    except (ValueError, OverflowError, LookupError):  # a date, duration or time zone that Python has not
        return Dropped("rejected", "wrong_type")


def _as_binary(form: Any) -> Any:
    """An Arrow type with its strings as bytes, each in a place of its own, and of messages what is read of them."""
    import pyarrow as pa

    if pa.types.is_dictionary(form):
        return _as_binary(form.value_type)
    if pa.types.is_string(form):
        return pa.binary()
    if pa.types.is_large_string(form) or pa.types.is_string_view(form) or pa.types.is_binary_view(form):
        return pa.large_binary()
    if pa.types.is_struct(form):
        fields = [field for field in form if field.name in _MESSAGE_FIELDS] or list(form)
        return pa.struct([field.with_type(_as_binary(field.type)) for field in fields])
    if pa.types.is_list(form) or pa.types.is_large_list(form):
        of = pa.large_list if pa.types.is_large_list(form) else pa.list_
        return of(form.value_field.with_type(_as_binary(form.value_type)))
    return form


def _shares(form: Any) -> bool:
    """Whether values of an Arrow type may lie in one place of memory, so that bytes of their own would be many more."""
    import pyarrow as pa

    if pa.types.is_nested(form):
        return any(_shares(form.field(i).type) for i in range(form.num_fields))
    return bool(pa.types.is_dictionary(form) or pa.types.is_string_view(form) or pa.types.is_binary_view(form))


def _is_bytes(form: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(form) or pa.types.is_large_binary(form))


def _values(column: Any) -> int:
    """How many values, lists and structs an Arrow array holds at all depths."""
    import pyarrow as pa

    if pa.types.is_struct(column.type):
        return len(column) + sum(map(_values, column.flatten()))
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return len(column) + _values(column.flatten())
    return len(column)
