"""Documents of text files, `.txt` and `.md`, each a document: grouped into parts by a list of them in the work folder.

The list has a line for each file, `[path, bytes]` and a tag where it is in a store, and a span is a range of its bytes:
so the plan of a million files is a few lines, and a worker reads the names of its own. The list's name is its digest.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import replace
from lzma import LZMAError
from pathlib import Path
from typing import Any, BinaryIO

from chimera.cli import UserError
from chimera.convert.read.columns import check_columns
from chimera.convert.read.files import Found, check_not_a_pointer
from chimera.convert.read.parsing import Dropped
from chimera.convert.read.reading import (
    BOM,
    LONGEST_LINE,
    RAW_SHOWN,
    Position,
    Row,
    Span,
    Wanted,
    check_line,
    open_lines,
    packing_of,
)
from chimera.convert.read.store_files import open_object
from chimera.limits import Limits
from chimera.stores import StoreError, is_remote
from chimera.text import one_line

KINDS = (".txt", ".md")
DENSE = 4  # text is about this many times larger than its .gz or .zst
_SPANS = 8  # of a part, which are joined again


class Listing:
    """Takes the text files of a source in order, and appends spans of at least `part_bytes / 8` bytes to `spans`.

    Without a `folder` for the list it is only described.
    """

    def __init__(self, folder: Path | None, part_bytes: int, spans: list[Span]) -> None:
        self._enough, self._spans = max(1, part_bytes // _SPANS), spans
        self._folder = folder
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._count = self._bytes = 0
        self._begin = self._end = self._weight = 0

    def add(self, found: Found) -> None:
        line = json.dumps([found.path, found.bytes, *([found.etag] if found.etag else [])]).encode() + b"\n"
        if self._folder:
            self._file = self._file or open(self._folder / ".files.tmp", "wb")  # noqa: SIM115 (see `close`)
            self._file.write(line)
        self._digest.update(line)
        self._count, self._bytes = self._count + 1, self._bytes + found.bytes
        self._end, self._weight = self._end + len(line), self._weight + _weight(found.path, found.bytes)
        if self._weight >= self._enough:
            self.cut()

    def cut(self) -> None:
        """End the span at hand: a file of another kind follows."""
        if self._end > self._begin:
            self._spans.append(Span("texts", "", self._begin, self._end, self._weight))
            self._begin, self._weight = self._end, 0

    def close(self) -> dict[str, Any]:
        """Put the list in its place; what the manifest says of it: empty where no file came."""
        self.cut()
        if not self._count:
            return {}
        if self._file:
            path = Path(self._file.name).with_name(f"files-{self._digest.hexdigest()[:16]}.jsonl")
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._file.name, path)
            self._spans[:] = [replace(span, file=str(path)) if span.kind == "texts" else span for span in self._spans]
        return {"files": self._count, "bytes": self._bytes, "sha256": self._digest.hexdigest()}


def rows_of_texts(span: Span, column: Wanted, start: Position, limits: Limits) -> Iterator[Row]:
    """The documents of a span's files from `start` on, each a row of one column, `text`.

    Raises `UserError` naming a file that is gone, damaged, or not of the size it had when the build began.
    """
    with open(span.file, "rb") as listing:
        listing.seek(span.begin)
        for number, line in enumerate(listing):
            if span.end is not None and listing.tell() > span.end:
                return
            if number < start.number:
                continue
            path, size, *etag = json.loads(line)
            if number == start.number:
                check_columns(path, ["text"], column)
            data = _read(path, size, etag[0] if etag else None, limits)
            value = Dropped("rejected", "row_too_long") if data is None else {"text": data}
            raw, length = (data[:RAW_SHOWN], len(data)) if data is not None else (None, 0)
            del data
            row = Row(value, raw, 0, _weight(path, size), Position(number + 1), length, file=path)
            del value, raw
            yield row


def _read(path: str, size: int, etag: str | None, limits: Limits) -> bytes | None:
    """What a file says, decompressed; `None` where that is more than a row may be."""
    try:
        remote = is_remote(path)
        with open_object(path, size, etag, limits.retries) if remote else open(path, "rb") as file:
            if not remote and (now := os.fstat(file.fileno()).st_size) != size:
                raise UserError(
                    f"{path}: it has {now} bytes, and had {size} when the build began: bring those back, or set "
                    "`rebuild=true`"
                )
            lines = open_lines(Span("texts", path, 0, None, size), file, Position())[0]
            data = lines.read(LONGEST_LINE)
            if len(data) == LONGEST_LINE and lines.read(1):
                return None
    except StoreError:
        raise
    except (OSError, EOFError, ValueError, zlib.error, LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError):
            raise
        raise UserError(
            f"{path} cannot be read to its end: {one_line(error)}: fix the file, or remove it and set `rebuild=true`"
        ) from error
    check_not_a_pointer(path, data)
    check_line(path, "its text", len(data), limits)
    return data.removeprefix(BOM)


def _weight(path: str, size: int) -> int:
    return size * (DENSE if packing_of(path) else 1)
