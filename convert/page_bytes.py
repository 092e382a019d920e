"""What the pages of a parquet column hold, decompressed piece by piece.

Snappy's format: https://github.com/google/snappy/blob/main/format_description.txt.
"""

import io
from collections.abc import Iterator
from typing import Any, BinaryIO

AT_ONCE = 16 << 20  # bytes: pages up to this are read whole
BLOCK = 1 << 16  # bytes that snappy compresses by themselves: nothing in them refers to bytes before
CODECS = ("UNCOMPRESSED", "SNAPPY", "GZIP", "ZSTD", "BROTLI")  # as pyarrow names them


class Unknown(ValueError):
    """What of a file cannot be read here."""


def decompressed(file: BinaryIO, codec: str, begin: int, size: int, plain: int) -> BinaryIO:
    """What the `size` bytes of a file from `begin` on hold, which are `plain` once decompressed."""
    import pyarrow as pa

    packed, codec = section(file, begin, size), codec.lower()
    if codec == "uncompressed":
        return packed
    if plain <= AT_ONCE:
        data = take(packed, size)
        return io.BytesIO(pa.Codec(codec).decompress(data, plain, asbytes=True) if plain else b"")
    if codec == "snappy":
        return io.BufferedReader(_Blocks(_snappy(packed, plain)), BLOCK)
    stream = pa.CompressedInputStream(pa.PythonFile(packed, "r"), codec)
    return io.BufferedReader(_Blocks(iter(lambda: stream.read(BLOCK), b"")), BLOCK)


def section(file: BinaryIO, begin: int, size: int, buffer: int = BLOCK) -> io.BufferedReader:
    return io.BufferedReader(_Section(file, begin, begin + size), buffer)


def take(stream: BinaryIO, size: int) -> bytes:
    """Exactly the next `size` bytes."""
    data = stream.read(size)
    if len(data) != size:
        raise ValueError("a page ends too early")
    return data


def varint(stream: BinaryIO) -> int:
    value = 0
    for shift in range(0, 64, 7):
        byte = take(stream, 1)[0]
        value |= (byte & 127) << shift
        if byte < 128:
            return value
    raise ValueError("a number of too many bytes")


class _Section(io.RawIOBase):
    """Bytes [begin, end) of a file that others read too; `tell` counts from the file's beginning."""

    def __init__(self, file: BinaryIO, begin: int, end: int) -> None:
        self._file, self._at, self._end = file, begin, end

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._at)
        data = self._file.read(min(len(buffer), self._end - self._at))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class _Blocks(io.RawIOBase):
    """Reads what an iterator of blocks gives."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._block = blocks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._block:
            self._block = memoryview(next(self._blocks, b""))
        size = min(len(buffer), len(self._block))
        buffer[:size] = self._block[:size]
        self._block = self._block[size:]
        return size


# What each tag of snappy's elements (literals, copies of what came before) says: the element's bytes, of which a long
# literal tells behind its tag (0), and those it stands for
_STEPS = [(0, 2, 3, 5)[tag & 3] or (tag // 4 + 2) * (tag < 240) for tag in range(256)]
_LENGTHS = [tag // 4 % 8 + 4 if tag & 3 == 1 else tag // 4 + 1 for tag in range(256)]


def _snappy(stream: BinaryIO, size: int) -> Iterator[bytes]:
    """The blocks of a snappy text of `size` bytes.

    Snappy's own compressor, and with it all in use, take `BLOCK` bytes at a time and refer to none before. So where a
    block ends in the compressed text is found by its elements' lengths, and a block is decompressed as a text.
    """
    import pyarrow as pa

    codec, data, left = pa.Codec("snappy"), b"", varint(stream)
    if left != size:
        raise ValueError(f"a page of {size} bytes holds {left}")
    while left:
        if len(data) < 2 * BLOCK:  # more than a block can take
            data += stream.read(2 * BLOCK)
        block, at, length = min(left, BLOCK), 0, 0
        while length < block and at < len(data):
            tag = data[at]
            if step := _STEPS[tag]:
                at += step
                length += _LENGTHS[tag]
            else:
                behind = at + (tag >> 2) - 58
                literal = int.from_bytes(data[at + 1 : behind], "little") + 1
                at = behind + literal
                length += literal
        if length < block or at > len(data):
            raise ValueError("a page ends too early")
        if length > block:
            raise Unknown("snappy that refers beyond its blocks")
        says = bytes((block & 127 | 128, block >> 7 & 127 | 128, block >> 14))  # its length as a varint
        try:
            yield codec.decompress(says + data[:at], block, asbytes=True)
        except OSError:
            raise Unknown("snappy that refers beyond its blocks") from None
        data, left = data[at:], left - block
