"""The texts of a stream's own validation set, by their digests: training rows that hold one of them are found.

They are read while planning, before any part begins, so that what becomes of a row depends on nothing else.
"""

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from chimera.cli import UserError
from chimera.convert.build.batches import text_digest
from chimera.convert.encode.document import Document
from chimera.convert.encode.documents import DocumentReader
from chimera.convert.read.parsing import Dropped
from chimera.convert.read.reading import Position, Wanted
from chimera.convert.read.sources import Part, rows
from chimera.files import write_whole
from chimera.limits import Limits
from chimera.mds import Array, digest


def write_digests(file: Path, parts: Iterable[Part], column: Wanted, reader: DocumentReader, limits: Limits) -> str:
    """Make `file` hold the digests of the documents of a validation set, all of whose rows are read; its SHA-256."""
    found = set()
    for span in (span for part in parts for span in part.spans):
        for row in rows(span, column, Position(), limits):
            document = None if row.value is None or isinstance(row.value, Dropped) else reader.read(row.value)
            if isinstance(document, Document):
                found.add(text_digest(document))
    buffer = io.BytesIO()
    np.save(buffer, np.array(sorted(found), np.uint64))
    write_whole(file, buffer.getvalue())
    return digest("sha256", buffer.getvalue())


class HeldOut:
    """`digests` are sorted."""

    def __init__(self, digests: Array) -> None:
        self._digests = digests

    @classmethod
    def read(cls, file: Path, sha256: str | None) -> "HeldOut":
        """What `write_digests` wrote.

        Raises `UserError` where the file's hash is not `sha256` (`None`: an earlier version kept none).
        """
        data = file.read_bytes()
        if sha256 not in (None, digest("sha256", data)):
            raise UserError(f"{file} is damaged (its hash is not the plan's): remove {file.parent} and build again")
        return cls(np.load(io.BytesIO(data)))

    def __contains__(self, document: Document) -> bool:
        if not len(self._digests):
            return False
        digest = np.uint64(text_digest(document))
        place = int(np.searchsorted(self._digests, digest))
        return place < len(self._digests) and self._digests[place] == digest
