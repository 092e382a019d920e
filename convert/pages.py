"""The values of a parquet column of text, one at a time, however large its pages are.

Arrow reads a page whole and a dictionary twice. Here a page is decompressed piece by piece, a large dictionary lies in
an unnamed file, and one value is held at a time. What cannot be read here is said (`Unknown`), never guessed.

The format: https://parquet.apache.org/docs/file-format/, and for the headers of pages the compact protocol of
https://github.com/apache/thrift/tree/master/doc/specs.
"""

import array
import io
import itertools
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from convert.page_bytes import AT_ONCE, BLOCK, CODECS, Unknown, decompressed, section, take, varint
from convert.reading import LONGEST_LINE

_LEVELS = 64 << 20  # bytes that a page's levels, which tell where its values belong, may take
_HEADER = 16 << 20  # bytes that a page's header may take, with the least and the largest value it tells
_STEP = 16  # entries of a dictionary on disk from one whose place is known to the next
_ENCODINGS = ("PLAIN", "RLE", "PLAIN_DICTIONARY", "RLE_DICTIONARY")
_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3  # types of pages
_ABOUT = {_DATA: (5, 4), _DICTIONARY: (7, 1), _DATA_V2: (8, 6)}  # a header's field for each, and the numbers it has
_PLAIN, _RLE, _INDICES = 0, 3, (2, 8)  # encodings

TOO_LONG = object()  # stands for a value above `LONGEST_LINE`
Value = Any  # bytes, `None` or `TOO_LONG`


class Entries(NamedTuple):
    """A page's levels and values: the next value belongs to the next entry whose definition level is the highest."""

    repetition: Iterator[int]
    definition: Iterator[int]
    values: Iterator[Value]


class _Page(NamedTuple):
    type: int
    length: int  # entries
    begin: int  # where in the file its content begins,
    size: int  # how many bytes that has,
    plain: int  # and how many once decompressed
    header: dict[int, Any]  # what is said for its type
    checksum: int | None  # CRC-32 of its content


def is_of(path: str, column: str) -> bool:
    """Whether a leaf's path in the schema is that of a column, or within it."""
    return path == column or path.startswith(f"{column}.")


def largest_page(file: BinaryIO, chunk: Any) -> int:
    """Bytes of the largest page of a column chunk once decompressed; only the pages' headers are read."""
    return max((page.plain for page in _pages(file, chunk)), default=0)


class Leaf:
    """A column chunk of text in an open file.

    `chunk` and `schema` are its metadata as pyarrow has it, `scratch` is the folder for a large dictionary (`None`:
    the system's). Raises `Unknown` where the metadata tells that it cannot be read here.
    """

    def __init__(self, file: BinaryIO, chunk: Any, schema: Any, scratch: Path | None) -> None:
        encodings = [(encoding, _ENCODINGS) for encoding in chunk.encodings]
        for is_, known in [(schema.physical_type, ("BYTE_ARRAY",)), (chunk.compression, CODECS), *encodings]:
            if is_ not in known:
                raise Unknown(is_)
        self._file, self._chunk, self._scratch = file, chunk, scratch
        self.repetition, self.definition = schema.max_repetition_level, schema.max_definition_level

    def values(self, skip: int) -> Iterator[Value]:
        """The values of a column without lists, from `skip` on."""
        for page, dictionary in self._data_pages():
            if page.length <= skip:
                skip -= page.length
                continue
            _, definition, values = self._entries(page, dictionary)
            for level in definition:
                if not skip:
                    yield next(values) if level == self.definition else None
                    continue
                skip -= 1
                if level == self.definition:
                    next(values)

    def entries(self) -> Iterator[Entries]:
        """Page by page."""
        return itertools.starmap(self._entries, self._data_pages())

    def _verified(self, page: _Page) -> tuple[BinaryIO, int]:
        """A file that holds a page's content, and where it begins there. Raises where its checksum is another's."""
        if page.checksum is None:
            return self._file, page.begin
        content, found = section(self._file, page.begin, page.size), 0
        kept = bytearray()  # of a page that is not large, which so is fetched once where it lies on a hub
        for data in iter(lambda: content.read(BLOCK), b""):
            found = zlib.crc32(data, found)
            if page.size <= AT_ONCE:
                kept += data
        if found != page.checksum & 0xFFFFFFFF:
            raise ValueError(f"the page at byte {page.begin} is not what its CRC checksum says")
        return (io.BytesIO(kept), 0) if kept else (self._file, page.begin)

    def _content(self, file: BinaryIO, begin: int, size: int, plain: int) -> BinaryIO:
        return decompressed(file, self._chunk.compression, begin, size, plain)

    def _data_pages(self) -> Iterator[tuple[_Page, "_Dictionary | None"]]:
        dictionary = None
        for page in _pages(self._file, self._chunk):
            if page.type == _DICTIONARY:
                data = self._content(*self._verified(page), page.size, page.plain)
                dictionary = _Dictionary(data, page.header[1], page.plain, self._scratch)
            else:
                yield page, dictionary

    def _entries(self, page: _Page, dictionary: "_Dictionary | None") -> Entries:
        highest = (self.repetition, self.definition)
        file, begin = self._verified(page)
        if page.type == _DATA:
            encoding, kinds = page.header[2], (page.header[4], page.header[3])
            if any(level and kind != _RLE for level, kind in zip(highest, kinds, strict=True)):
                raise Unknown(f"levels of encoding {kinds}")
            content = self._content(file, begin, page.size, page.plain)
            levels = [_levels(content, _length(content)) if level else b"" for level in highest]
        else:
            encoding, sizes = page.header[4], (page.header[6], page.header[5])
            content, before = section(file, begin, page.size), sum(sizes)
            if before > min(page.size, page.plain):
                raise ValueError(f"a page of {page.plain} bytes has {before} of levels")
            levels = [_levels(content, size) for size in sizes]
            if page.header.get(7, True):
                content = self._content(file, begin + before, page.size - before, page.plain - before)
        repetition, definition = (
            _runs(io.BytesIO(data), level.bit_length(), page.length) if level else itertools.repeat(0, page.length)
            for level, data in zip(highest, levels, strict=True)
        )
        if encoding == _PLAIN:
            return Entries(repetition, definition, _plain_values(content))
        if encoding not in _INDICES or dictionary is None:
            raise Unknown(f"values of encoding {encoding}")
        return Entries(repetition, definition, map(dictionary.__getitem__, _indices(content, page.length)))


class _Dictionary:
    """The values that a column's indices stand for; those of a large page lie on disk."""

    _UNKEPT = 2**32 - 1  # the length of a value that is too long to be kept

    def __init__(self, content: BinaryIO, count: int, size: int, scratch: Path | None) -> None:
        values = itertools.islice(_plain_values(content), count)
        self._count = count
        self._values = list(values) if size <= AT_ONCE else None
        if self._values is not None:
            return
        self._begins = array.array("Q")
        self._file = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 (goes with this object)
        for number, value in enumerate(values):
            if number % _STEP == 0:
                self._begins.append(self._file.tell())
            self._file.write((self._UNKEPT if value is TOO_LONG else len(value)).to_bytes(4, "little"))
            if value is not TOO_LONG:
                self._file.write(value)

    def __getitem__(self, index: int) -> Value:
        if index >= self._count:
            raise ValueError(f"an index of {index} into {self._count} values")
        if self._values is not None:
            return self._values[index]
        self._file.seek(self._begins[index // _STEP])
        for _ in range(index % _STEP):
            size = _length(self._file)
            self._file.seek(0 if size == self._UNKEPT else size, io.SEEK_CUR)
        size = _length(self._file)
        return TOO_LONG if size == self._UNKEPT else take(self._file, size)


# Pages


def _pages(file: BinaryIO, chunk: Any) -> Iterator[_Page]:
    """The dictionary's and the data's pages of a column chunk."""
    at, left = chunk.dictionary_page_offset or chunk.data_page_offset, chunk.num_values
    while left > 0:
        reader = section(file, at, _HEADER, 1 << 12)
        try:
            header = _struct(reader)
            kind, plain, size = header[1], header[2], header[3]
            field, numbers = _ABOUT[kind]
            about = header[field]
            known = min(plain, size, *(about[number] for number in range(1, numbers + 1))) >= 0
            known = known and isinstance(header.get(4, 0), int)
        except (ValueError, KeyError, TypeError, RecursionError):
            known = False
        if not known:
            raise ValueError(f"there is no header of a page at byte {at}")
        at = reader.tell() + size
        yield _Page(kind, about[1], at - size, size, plain, about, header.get(4))
        if kind != _DICTIONARY:
            left -= about[1]


def _struct(stream: BinaryIO) -> dict[int, Any]:
    """A struct of thrift's compact protocol, by its fields' numbers."""
    fields: dict[int, Any] = {}
    number = 0
    while head := take(stream, 1)[0]:
        number = number + (head >> 4) if head >> 4 else _integer(stream)
        kind = head & 15
        if kind in (1, 2):
            fields[number] = kind == 1
        elif kind in (4, 5, 6):
            fields[number] = _integer(stream)
        elif kind == 8:
            fields[number] = take(stream, min(varint(stream), _HEADER))
        elif kind == 12:
            fields[number] = _struct(stream)
        else:
            raise ValueError
    return fields


def _integer(stream: BinaryIO) -> int:
    number = varint(stream)
    return number >> 1 ^ -(number & 1)


# Values


def _plain_values(stream: BinaryIO) -> Iterator[Value]:
    while True:
        size = _length(stream)
        if size <= LONGEST_LINE:
            yield take(stream, size)
            continue
        while size:
            size -= len(take(stream, min(size, 1 << 20)))
        yield TOO_LONG


def _indices(stream: BinaryIO, count: int) -> Iterator[int]:
    width = take(stream, 1)[0]
    if width > 32:
        raise ValueError(f"indices of {width} bits")
    yield from _runs(stream, width, count)


def _levels(stream: BinaryIO, size: int) -> bytes:
    if size > _LEVELS:
        raise Unknown(f"{size} bytes of levels in a page")
    return take(stream, size)


def _length(stream: BinaryIO) -> int:
    return int.from_bytes(take(stream, 4), "little")


def _runs(stream: BinaryIO, width: int, count: int) -> Iterator[int]:
    """`count` numbers of `width` bits in runs of equal ones and of packed ones (parquet's RLE hybrid)."""
    while count > 0:
        head = varint(stream)
        if not head & 1:
            number = int.from_bytes(take(stream, (width + 7) // 8), "little")
            yield from itertools.repeat(number, min(head >> 1, count))
            count -= head >> 1
            continue
        groups = head >> 1  # of eight
        while groups and count > 0:
            some = min(groups, 1024)
            packed = np.frombuffer(take(stream, some * width), np.uint8)
            bits = np.unpackbits(packed, bitorder="little").reshape(some * 8, width)
            yield from (bits @ (1 << np.arange(width, dtype=np.int64)))[:count].tolist()
            groups, count = groups - some, count - some * 8
