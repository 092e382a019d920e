"""Where a stream's rows come from: the first of its sources that opens, cut into parts by the source alone.

A part is one or more spans of files. How a source is cut depends on its files and `part_bytes` only, never on the
number of workers, so any part can be done by anyone, in any order, again.
"""

import contextlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from chimera.cli import UserError, say
from chimera.convert.read.cannot_open import CannotOpen
from chimera.convert.read.columns import check_columns
from chimera.convert.read.files import Found, check_not_a_pointer, find
from chimera.convert.read.parquet import column_bytes, open_parquet
from chimera.convert.read.readers import open_span, reader_of, rows_of_file
from chimera.convert.read.reading import Position, Row, Span, Wanted, kind_of, packing_of
from chimera.convert.read.store_files import changed, entries_now
from chimera.convert.read.text_files import DENSE, KINDS, Listing, rows_of_texts
from chimera.convert.settings import BuildSettings
from chimera.convert.stream_settings import SourceSettings, StreamSettings
from chimera.limits import Limits
from chimera.mds import Json
from chimera.objects_client import Entry
from chimera.stores import is_remote
from chimera.text import counted, one_line

_POINTER = 1024  # bytes: what git has in place of a large file is smaller


@dataclass(frozen=True)
class Part:
    spans: tuple[Span, ...]

    @property
    def bytes(self) -> int:
        return sum(span.bytes for span in self.spans)


@dataclass(frozen=True)
class Opened:
    """The source in use. `describe` goes to the manifest; `column` is what to read of a row."""

    index: int
    column: Wanted
    describe: Json
    passed_over: list[Json]
    parts: list[Part]


def open_source(name: str, stream: StreamSettings, settings: BuildSettings, work: Path) -> Opened:
    """The first source of the stream that opens; `work` is a folder for lists of files.

    Raises `UserError` with every source's reason when none does, and for a source that is there but wrong (a column
    it does not have).
    """
    passed_over: list[Json] = []
    for index, source in enumerate(stream.sources):
        try:
            describe, parts = _open(name, stream, source, settings, work)
        except CannotOpen as error:
            reason = one_line(error)
            passed_over.append({"source": source_name(source), "reason": reason})
            say(f"{name}: source {source_name(source)} passed over: {reason}")
            continue
        say(f"{name}: source {source_name(source)}, {counted(len(parts), 'part')}")
        return Opened(index, _column(stream, source), describe, passed_over, parts)
    reasons = "; ".join(f"{p['source']}: {p['reason']}" for p in passed_over)
    raise UserError(f"streams.{name}: no source opens: {reasons}: check the paths, the network and your access")


def _open(
    name: str, stream: StreamSettings, source: SourceSettings, build: BuildSettings, work: Path
) -> tuple[Json, list[Part]]:
    if source.hub:
        from chimera.convert.read.hub import open_hub

        describe, of_set = open_hub(f"streams.{name}", source, _column(stream, source), build.limits())
        return describe, [Part((span,)) for span in of_set]
    where, column = f"streams.{name}", _column(stream, source)
    files: list[Json] = []
    spans: list[Span] = []
    texts = Listing(work, build.part_bytes, spans)
    for found in _found(source, where, build):
        if _is_text(found):
            texts.add(found)
            continue
        texts.cut()
        reader_of(found.path)
        spans += _cut(found, where, column, build)
        files.append({"path": found.path, "bytes": found.bytes, **({"etag": found.etag} if found.etag else {})})
    listed = texts.close()
    if listed:
        check_columns(f"{where}: text files", ["text"], column)
    return {"files": files, **({"texts": listed} if listed else {})}, _group(spans, build.part_bytes)


def _is_text(found: Found) -> bool:
    """Whether a file is a document: of a set's card its lines are."""
    return kind_of(found.path) in KINDS and not found.of_set


def rows(span: Span, column: Wanted, start: Position, limits: Limits) -> Iterator[Row]:
    """Rows of any span from `start`."""
    if span.kind == "texts":
        return rows_of_texts(span, column, start, limits)
    if span.kind == "hub":
        from chimera.convert.read.hub import rows_of_hub

        found: Iterator[Row] = rows_of_hub(span, column, start, limits)
        return found
    return rows_of_file(span, column, start, limits)


def source_name(source: SourceSettings) -> str:
    """How a source is called in messages and the manifest."""
    if not source.hub:
        return ", ".join(source.files)
    revision = f"@{source.revision}" if source.revision else ""
    which = ", ".join(filter(None, (source.subset, source.data_dir)))
    return f"{source.hub}{revision}" + (f" ({which})" if which else "")


def _column(stream: StreamSettings, source: SourceSettings) -> Wanted:
    """What to read of a row."""
    if stream.format == "text":
        return list(source.column) if isinstance(source.column, list) else str(source.column)
    return None if stream.messages == "auto" else stream.messages.model_dump(exclude_none=True)


def changed_files(describe: Json) -> list[str]:
    """The files of a source that no longer have the size (and tag) they had; what is gone is not among them."""
    files, now = describe.get("files", []), _now(describe)
    return [f["path"] for f in files if (e := now[f["path"]]) and changed(e, f["bytes"], f.get("etag"))]


def gone_files(describe: Json) -> list[str]:
    """The files of a source that are not there any more."""
    return [path for path, entry in _now(describe).items() if entry is None]


def _now(describe: Json) -> dict[str, Entry | None]:
    """What there is in the place of each of a source's files."""
    paths = [file["path"] for file in describe.get("files", [])]
    found = entries_now([path for path in paths if is_remote(path)])
    local = {
        path: Entry(path, os.path.getsize(path)) if os.path.exists(path) else None
        for path in paths
        if path not in found
    }
    return {**local, **found}


def added_files(describe: Json, source: SourceSettings, build: BuildSettings) -> list[str]:
    """Local files that a source's patterns find now and did not when it was described.

    None where all of its files are gone: a finished build does not need them any more.
    """
    known = {_real(file["path"]) for file in describe.get("files", [])}
    texts = Listing(None, build.part_bytes, [])
    if not (any(_now(describe).values()) or "texts" in describe):
        return []
    added: list[str] = []
    with contextlib.suppress(CannotOpen):
        for found in _found(source, "", build):
            if _is_text(found):
                texts.add(found)
            elif _real(found.path) not in known:
                added.append(found.path)
        before = describe.get("texts")
        listed = texts.close()
        if listed and listed != before:  # all gone: as above
            added.append(f"other text files ({_amount(listed)}; before {_amount(before) if before else 'none'})")
    return added


def _amount(texts: Json) -> str:
    return f"{texts['files']}, {texts['bytes']} bytes"


def _real(path: str) -> str:
    return path if is_remote(path) else os.path.realpath(path)


def _found(source: SourceSettings, where: str, build: BuildSettings) -> Iterator[Found]:
    """The files of a source, but for those that the build itself writes, which a glob may find on a rerun."""
    written = [] if build.remote else [Path(build.output) / name for name in ("rejects", "proof")]
    return find(source.files, where, build.retries, [build.work_folder, *written])


def _cut(found: Found, where: str, column: Wanted, build: BuildSettings) -> list[Span]:
    """The smallest pieces a file can be cut into."""
    file, size = found.path, found.bytes
    if size < _POINTER and not found.remote:
        check_not_a_pointer(file, Path(file).read_bytes())
    whole = Span("file", file, 0, None, size, stored=size if found.remote else None, etag=found.etag)
    if kind_of(file) == ".parquet":
        return _row_groups(whole, where, column, build)
    if kind_of(file) not in (".jsonl", ".ndjson") or packing_of(file):
        return [replace(whole, delimiter="\t" if kind_of(file) == ".tsv" else ",")]
    ranges = max(1, -(-size // build.part_bytes))
    cuts = [size * i // ranges for i in range(ranges + 1)]
    return [replace(whole, begin=a, end=b, bytes=b - a, size=size) for a, b in itertools.pairwise(cuts)]


def _row_groups(whole: Span, where: str, column: Wanted, build: BuildSettings) -> list[Span]:
    file, limits = whole.file, build.limits()
    try:
        with open_span(whole, limits) as stream, open_parquet(f"{where}: {file}", stream, limits) as parquet:
            meta, names = parquet.metadata, parquet.schema_arrow.names
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: {file} is no parquet file ({error}): fix or remove it") from None
    wanted = check_columns(f"{where}: {file}", names, column)
    spans = []
    for group in range(meta.num_row_groups):
        size = column_bytes(meta.row_group(group), wanted)
        spans.append(replace(whole, begin=group, end=group + 1, bytes=size))
    return spans


def _group(spans: list[Span], part_bytes: int) -> list[Part]:
    """Neighboring spans joined to as few parts of about `part_bytes` of text as hold them, all about as large."""
    weights = [span.bytes * (DENSE if packing_of(span.file) else 1) for span in spans]
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
