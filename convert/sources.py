"""Where a stream's rows come from: the first of its sources that opens, cut into parts by the source alone.

A part is one or more spans of files. How a source is cut depends on its files and `part_bytes` only, never on the
number of workers, so any part can be done by anyone, in any order, again.
"""

import contextlib
import glob
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from chimera.cli import UserError, counted, one_line, say
from convert.columnar import column_bytes, conversation_columns, open_parquet
from convert.reading import Position, Row, Span, rows_of_file
from convert.settings import BuildSettings, SourceSettings, StreamSettings
from convert.shards import Json

FILE_KINDS = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")
_PACKED = 4  # text is about this many times larger than its .gz or .zst


class CannotOpen(Exception):
    """A source that is not there for us; the next of the list is tried."""


@dataclass(frozen=True)
class Part:
    spans: tuple[Span, ...]

    @property
    def bytes(self) -> int:
        return sum(span.bytes for span in self.spans)


@dataclass(frozen=True)
class Opened:
    """The source in use. `describe` goes to the manifest; `column` is the text column (`None`: conversations)."""

    index: int
    column: str | None
    describe: Json
    passed_over: list[Json]
    parts: list[Part]


def open_source(name: str, stream: StreamSettings, settings: BuildSettings) -> Opened:
    """The first source of the stream that opens.

    Raises `UserError` with every source's reason when none does, and for a source that is there but wrong (a column
    it does not have).
    """
    passed_over: list[Json] = []
    for index, source in enumerate(stream.sources):
        try:
            describe, parts = _open(name, stream, source, settings)
        except CannotOpen as error:
            reason = one_line(error)
            passed_over.append({"source": source_name(source), "reason": reason})
            say(f"{name}: source {source_name(source)} passed over: {reason}")
            continue
        say(f"{name}: source {source_name(source)}, {counted(len(parts), 'part')}")
        return Opened(index, _column(stream, source), describe, passed_over, parts)
    reasons = "; ".join(f"{p['source']}: {p['reason']}" for p in passed_over)
    raise UserError(f"streams.{name}: no source opens: {reasons}: check the paths, the network and your access")


def _open(name: str, stream: StreamSettings, source: SourceSettings, build: BuildSettings) -> tuple[Json, list[Part]]:
    if source.hub:
        from convert.hub import open_hub

        describe, spans = open_hub(f"streams.{name}", source, _column(stream, source), build.retries)
        return describe, [Part((span,)) for span in spans]
    files = _expand(source.files, build)
    spans = [span for file in files for span in _cut(file, f"streams.{name}", stream, source, build.part_bytes)]
    describe = {"files": [{"path": file, "bytes": os.path.getsize(file)} for file in files]}
    return describe, _group(spans, build.part_bytes)


def rows(span: Span, column: str | None, start: Position, retries: int, scratch: Path | None = None) -> Iterator[Row]:
    """Rows of any span from `start`; `scratch` as for `rows_of_file`."""
    if span.kind == "hub":
        from convert.hub import rows_of_hub

        found: Iterator[Row] = rows_of_hub(span, column, start, retries, scratch)
        return found
    return rows_of_file(span, column, start, scratch)


def source_name(source: SourceSettings) -> str:
    """How a source is called in messages and the manifest."""
    if not source.hub:
        return ", ".join(source.files)
    revision = f"@{source.revision}" if source.revision else ""
    which = ", ".join(filter(None, (source.subset, source.data_dir)))
    return f"{source.hub}{revision}" + (f" ({which})" if which else "")


def _column(stream: StreamSettings, source: SourceSettings) -> str | None:
    return source.column if stream.format == "text" else None


def changed_files(describe: Json) -> list[str]:
    """The local files of a source that no longer have the size they had; files that are gone are not among them."""
    return [
        file["path"]
        for file in describe.get("files", [])
        if os.path.exists(file["path"]) and os.path.getsize(file["path"]) != file["bytes"]
    ]


def gone_files(describe: Json) -> list[str]:
    """The local files of a source that are not there any more."""
    return [file["path"] for file in describe.get("files", []) if not os.path.exists(file["path"])]


def added_files(describe: Json, source: SourceSettings, build: BuildSettings) -> list[str]:
    """Local files that a source's patterns find now and did not when it was described.

    None where all of its files are gone: a finished build does not need them any more.
    """
    known = {os.path.realpath(file["path"]) for file in describe.get("files", [])}
    if not any(map(os.path.exists, known)):
        return []
    with contextlib.suppress(CannotOpen):
        return [file for file in _expand(source.files, build) if os.path.realpath(file) not in known]
    return []


def _expand(patterns: list[str], build: BuildSettings) -> list[str]:
    """The files of paths and globs in the order given, a glob's sorted, each file once; not what the build writes."""
    files: dict[str, str] = {}  # by their real path: one file may be reached in several ways
    for pattern in patterns:
        found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
        found = [file for file in found if os.path.isfile(file) and not _is_ours(file, build)]
        if not found:
            folder = f"; it is a folder, of which `{pattern.rstrip('/')}/*.parquet` would be files"
            raise CannotOpen(f"no file at {pattern}{folder if os.path.isdir(pattern) else ''}")
        for file in found:
            files.setdefault(os.path.realpath(file), file)
    for file in files.values():
        if not file.isascii() and file != file.encode("utf-8", "replace").decode():
            raise UserError(f"{os.fsencode(file)!r}: the file's name is not UTF-8: rename it")
        if not file.endswith(FILE_KINDS):
            raise UserError(
                f"{file}: no reader for this kind of file (there is one for {', '.join(FILE_KINDS)}): convert it"
            )
        if not os.access(file, os.R_OK):
            raise CannotOpen(f"no permission to read {file}")
    return list(files.values())


def _is_ours(file: str, build: BuildSettings) -> bool:
    """Whether a file is one of those that the build itself writes, which a glob may find on a rerun."""
    folders = [build.work_folder, *([] if build.remote else [Path(build.output) / "rejects"])]
    return any(Path(os.path.realpath(file)).is_relative_to(os.path.realpath(folder)) for folder in folders)


def _cut(file: str, where: str, stream: StreamSettings, source: SourceSettings, part_bytes: int) -> list[Span]:
    """The smallest pieces a file can be cut into."""
    size = os.path.getsize(file)
    if file.endswith(".parquet"):
        return _row_groups(file, where, _column(stream, source))
    if file.endswith((".gz", ".zst")):
        return [Span("jsonl", file, 0, None, size)]
    ranges = max(1, -(-size // part_bytes))
    cuts = [size * i // ranges for i in range(ranges + 1)]
    return [Span("jsonl", file, a, b, b - a, size=size) for a, b in itertools.pairwise(cuts)]


def _row_groups(file: str, where: str, column: str | None) -> list[Span]:
    try:
        with open(file, "rb") as stream, open_parquet(f"{where}: {file}", stream) as parquet:
            meta, names = parquet.metadata, parquet.schema_arrow.names
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: {file} is no parquet file ({error}): mend or remove it") from None
    wanted = check_columns(f"{where}: {file}", names, column)
    spans = []
    for group in range(meta.num_row_groups):
        size = column_bytes(meta.row_group(group), wanted)
        spans.append(Span("parquet", file, group, group + 1, size))
    return spans


def check_columns(where: str, names: list[str], column: str | None) -> list[str]:
    """The columns to read of those there are; `UserError` naming `where` when they do not suffice."""
    if twice := [name for name in ([column] if column else names) if names.count(name) > 1]:
        raise UserError(f"{where} has more than one column `{twice[0]}`: rename one")
    if column is not None and column not in names:
        raise UserError(f"{where} has no column `{column}`: set `column` to one of {', '.join(names)}")
    wanted = [column] if column is not None else conversation_columns(names)
    if not wanted:
        raise UserError(f"{where} has neither `messages` nor `instruction` and `output`: it has {', '.join(names)}")
    return wanted


def _group(spans: list[Span], part_bytes: int) -> list[Part]:
    """Neighbouring spans joined to as few parts of about `part_bytes` of text as hold them, all about as large."""
    weights = [span.bytes * (_PACKED if span.file.endswith((".gz", ".zst")) else 1) for span in spans]
    total = max(1, sum(weights))
    count = -(-total // part_bytes)
    parts: list[list[Span]] = []
    number, before = -1, 0
    for span, weight in zip(spans, weights, strict=True):
        middle = min(count - 1, (2 * before + weight) * count // (2 * total))  # the part the span's middle lies in
        before += weight
        if middle != number:
            parts.append([span])
            number = middle
            continue
        last = parts[-1][-1]
        if last.file == span.file and last.end == span.begin:
            parts[-1][-1] = replace(last, end=span.end, bytes=last.bytes + span.bytes)
        else:
            parts[-1].append(span)
    return [Part(tuple(part)) for part in parts]
