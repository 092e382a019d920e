"""Rows of a parquet row group for which Arrow would need too much memory, put together from its columns' values.

Arrow's own writer puts a thousand rows into a page before it looks at its size: books of 400 kB make pages of 400 MB,
for which its reader needs more than a gigabyte.
"""

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from convert.documents import MOST_VALUES, Dropped
from convert.page_bytes import Unknown
from convert.pages import TOO_LONG, Leaf, is_of
from convert.reading import LONGEST_LINE

_ROW_TOO_LONG = Dropped("rejected", "row_too_long")
_TOO_MANY_VALUES = Dropped("rejected", "too_many_values")
_NO_ROW, _NO_STRUCT = object(), object()


def streamed_rows(
    file: BinaryIO, parquet: Any, group: int, columns: list[str], skip: int, scratch: Path | None
) -> Iterator[object]:
    """The rows of a row group from row `skip` on: a mapping with text as bytes, or `Dropped`.

    `file` is what `parquet`, a `ParquetFile`, reads; `scratch` is the folder for large dictionaries (`None`: the
    system's). Raises `Unknown` at once where the footer tells that these columns cannot be read, else on the way.
    """
    meta = parquet.metadata
    leaves: dict[str, list[Leaf]] = {name: [] for name in columns}
    for i in range(meta.num_columns):
        schema = meta.schema.column(i)
        for name in filter(functools.partial(is_of, schema.path), columns):
            if any(
                is_of(schema.path, other)
                for other in parquet.schema_arrow.names
                if is_of(other, name) and other != name
            ):
                continue  # of a column that is called `NAME.more`
            leaves[name].append(Leaf(file, meta.row_group(group).column(i), schema, scratch))
    found = {name: _column(parquet.schema_arrow.field(name), leaves[name], skip) for name in columns}
    return _rows(found, meta.row_group(group).num_rows - skip)


def _rows(columns: dict[str, Iterator[Any]], count: int) -> Iterator[object]:
    for _ in range(count):
        yield _row({name: next(column, _NO_ROW) for name, column in columns.items()})
    if any(next(column, _NO_ROW) is not _NO_ROW for column in columns.values()):
        raise ValueError("a column has more rows than its row group")


def _row(row: dict[str, Any]) -> object:
    for value in row.values():
        if value is _NO_ROW:
            raise ValueError("a column has fewer rows than its row group")
        if isinstance(value, Dropped):
            return value
    return _ROW_TOO_LONG if sum(map(_size, row.values())) > LONGEST_LINE else row


def _size(value: Any) -> int:
    """Bytes of text in a value."""
    if isinstance(value, list):
        return sum(len(text) for struct in value if struct for text in struct.values() if text)
    return len(value or b"")


def _column(field: Any, leaves: list[Leaf], skip: int) -> Iterator[Any]:
    """A column's value of each row: bytes, a list of mappings to bytes, `None` or `Dropped`."""
    if _is_text(field.type):
        if len(leaves) > 1:  # the other is a field of a struct
            raise Unknown(f"two columns of the path {field.name}")
        return map(_text, leaves[0].values(skip))
    import pyarrow as pa

    if not (pa.types.is_list(field.type) or pa.types.is_large_list(field.type)):
        raise Unknown(str(field.type))
    struct = field.type.value_field
    if not pa.types.is_struct(struct.type) or not all(_is_text(inner.type) for inner in struct.type):
        raise Unknown(str(field.type))
    in_list = int(field.nullable)  # the definition level of an empty list; above it are its elements
    in_struct = in_list + 1 + int(struct.nullable)  # and from here on they are structs
    lists = [_lists(leaf, in_list, in_struct) for leaf in leaves]
    rows = map(functools.partial(_structs, [inner.name for inner in struct.type]), *lists)
    return itertools.islice(rows, skip, None)


def _is_text(form: Any) -> bool:
    import pyarrow.types as kinds

    if kinds.is_dictionary(form):
        form = form.value_type
    wide = kinds.is_large_string(form) or kinds.is_large_binary(form)
    view = kinds.is_string_view(form) or kinds.is_binary_view(form)
    return bool(kinds.is_string(form) or kinds.is_binary(form) or wide or view)


def _text(value: Any) -> Any:
    return _ROW_TOO_LONG if value is TOO_LONG else value


def _lists(leaf: Leaf, in_list: int, in_struct: int) -> Iterator[Any]:
    """Each row's values of a leaf in lists; `None` for no list, `_NO_STRUCT` for an element that is none."""
    row: Any = _NO_ROW
    size = 0
    for page in leaf.entries():
        for repetition, definition in zip(page.repetition, page.definition, strict=True):
            value = next(page.values) if definition == leaf.definition else None
            if repetition == 0:
                whole, row, size = [row], None if definition < in_list else [], 0
                if whole[0] is not _NO_ROW:
                    yield whole.pop()  # not to hold it while it is worked on
            if definition <= in_list or isinstance(row, Dropped):
                continue
            if not isinstance(row, list):
                raise ValueError("an element of a list that is none")
            size += len(value) if isinstance(value, bytes) else 0
            if value is TOO_LONG or size > LONGEST_LINE:
                row = _ROW_TOO_LONG
            elif len(row) == MOST_VALUES:
                row = _TOO_MANY_VALUES
            else:
                row.append(value if definition >= in_struct else _NO_STRUCT)
    if row is not _NO_ROW:
        yield row


def _structs(names: list[str], *lists: Any) -> Any:
    """The list of structs that lists of each field's values make."""
    for values in lists:
        if values is None or isinstance(values, Dropped):
            return values
    if 1 + len(lists[0]) * (1 + len(names)) > MOST_VALUES:
        return _TOO_MANY_VALUES
    if any(len(values) != len(lists[0]) for values in lists):
        raise ValueError("the structs of a list lack fields")
    return [None if _NO_STRUCT in s else dict(zip(names, s, strict=True)) for s in zip(*lists, strict=True)]
