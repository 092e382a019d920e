"""Rows of Arrow's record batches, which its readers of parquet and of its own files give."""

from collections.abc import Iterator, Mapping
from typing import Any

from chimera.cli import UserError
from chimera.convert.read.parsing import MOST_VALUES, Dropped
from chimera.convert.read.reading import LONGEST_LINE, Wanted

SMALL_BATCH = 1 << 20  # bytes: its rows may be in memory together, which takes a third of the time
LISTS = ("messages", "conversations")
PROMPTS = ("instruction", "prompt", "question")
ANSWERS = ("output", "completion", "response", "answer")
# Where there is none of these: of WildChat and LMSYS, of MetaMath, and the plainest names of a pair.
OTHER_LISTS, OTHER_PAIRS = ("conversation",), (("query", "response"), ("query", "answer"), ("input", "output"))
# What `encode/conversations.py` uses of a row, or refuses it for; other columns are not read.
BESIDE = (
    *("input", "history", "system", "system_prompt", "system_message", "context", "chat_template_kwargs"),
    *("reasoning_content", "reasoning", "thinking", "tools", "functions", "tool_calls", "function_call"),
    *("image", "images", "audio", "audios", "video", "videos", "documents"),
)
CHAT_COLUMNS = (*LISTS, *PROMPTS, *ANSWERS, *BESIDE)


def check_columns(where: str, names: list[str], column: Wanted) -> list[str]:
    """The columns to read of those there are; `UserError` naming `where` when they do not suffice."""
    chat = column is None or isinstance(column, Mapping)
    if column is None or isinstance(column, Mapping):
        wanted = _conversation(names, column)
    else:
        wanted = [column] if isinstance(column, str) else list(column)
    if twice := [name for name in (names if chat else wanted) if names.count(name) > 1]:
        raise UserError(f"{where} has more than one column `{twice[0]}`: rename one")
    has = f"it has {', '.join(names)}" if names else "it has none at all (is it empty?)"
    if isinstance(column, Mapping) and column["list"] not in names:
        raise UserError(f"{where} has no column `{column['list']}`, which `messages.list` names: {has}")
    if not wanted:
        raise UserError(
            f"{where} has no conversation: {has}, and neither `messages` nor `conversations` nor a prompt and its "
            "answer (`instruction` and `output`, `prompt` and `completion` …): name the list with `messages: {list: …}`"
        )
    for name in () if chat else wanted:
        if name not in names and name.partition(".")[0] not in names:
            set_to = f"set `column` to one of {', '.join(names)}" if names else has
            if len(names) == 1 and (mark := next((m for m in ";\t|" if m in names[0]), None)):
                set_to = (
                    f"{has}, as one: its columns are parted by {mark!r} and not by what its name says: write it anew"
                )
            raise UserError(f"{where} has no column `{name}`: {set_to}")
    return wanted


def _conversation(names: list[str], column: Mapping[str, str] | None) -> list[str]:
    """The columns a conversation can be read from, with what may stand beside it; none when they do not suffice."""
    have = set(names)
    enough = bool(have.intersection(LISTS) or (have.intersection(PROMPTS) and have.intersection(ANSWERS)))
    wanted = set(CHAT_COLUMNS) if column is None else {*BESIDE, column["list"]}
    if not enough:
        wanted |= {*OTHER_LISTS, *(name for pair in OTHER_PAIRS for name in pair)} if column is None else set()
        enough = bool(have.intersection(OTHER_LISTS)) or any(have.issuperset(pair) for pair in OTHER_PAIRS)
    return [name for name in names if name in wanted] if enough or column is not None else []


def unread(names: list[str], columns: list[str], column: Wanted) -> tuple[str, ...]:
    """The columns of a table of conversations that are passed over."""
    return tuple(name for name in names if name not in columns) if column is None or isinstance(column, Mapping) else ()


def select(batch: Any, columns: list[str]) -> Any:
    """These columns of an Arrow batch; for a nested field its column, reduced to that field where possible."""
    names = batch.schema.names
    return batch.select(list(dict.fromkeys(name if name in names else name.partition(".")[0] for name in columns)))


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
    """An Arrow type with its strings as bytes, each in a place of its own."""
    import pyarrow as pa

    if pa.types.is_dictionary(form):
        return _as_binary(form.value_type)
    if pa.types.is_string(form):
        return pa.binary()
    if pa.types.is_large_string(form) or pa.types.is_string_view(form) or pa.types.is_binary_view(form):
        return pa.large_binary()
    if pa.types.is_struct(form):
        return pa.struct([field.with_type(_counted(field.type) or _as_binary(field.type)) for field in form])
    if pa.types.is_list(form) or pa.types.is_large_list(form):
        of = pa.large_list if pa.types.is_large_list(form) else pa.list_
        return of(form.value_field.with_type(_as_binary(form.value_type)))
    return form


def _counted(form: Any) -> Any:
    """The integer behind a time's type: beside a message's text one that Python has not must not cost the row."""
    import pyarrow as pa

    kinds = pa.types
    if kinds.is_date32(form) or kinds.is_time32(form):
        return pa.int32()
    return pa.int64() if kinds.is_temporal(form) and not kinds.is_interval(form) else None


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
