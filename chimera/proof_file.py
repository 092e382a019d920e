"""`proof/STREAM.jsonl.zst`: a sample of a stream's documents, with the ids and the mask that are stored of each.

A line of a text has `text` and `ids`. One of a conversation has `messages`, `tools` and which messages are `learned`;
the `text` that they are rendered to, `ids` and `mask`; `first`, the message that is the first learned answer, if there
is one; and `served`, whether a server makes these ids of it: not where contents spell control tokens, which stay text.
"""

import json
from collections.abc import Iterable, Iterator

import zstandard

from chimera.mds import Json

MOST_BYTES = 1 << 28  # of a file unpacked; a build's has about one MiB of text


def name_of(stream: str) -> str:
    """The file of a stream, at the root of its shards."""
    return f"proof/{stream}.jsonl.zst"


def pack(lines: Iterable[Json]) -> bytes:
    """A file of these lines."""
    text = "".join(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n" for line in lines)
    return zstandard.ZstdCompressor(level=3, write_checksum=True).compress(text.encode())


def unpack(packed: bytes) -> Iterator[Json]:
    """The lines of a file. Raises `ValueError` for what is none."""
    try:
        if zstandard.frame_content_size(packed) > MOST_BYTES:  # which `max_output_size` does not look at
            raise ValueError(f"it claims to hold more than {MOST_BYTES} bytes")
        data = zstandard.ZstdDecompressor().decompress(packed, max_output_size=MOST_BYTES)
    except zstandard.ZstdError as error:
        raise ValueError(f"damaged: {error}") from None
    yield from map(json.loads, data.splitlines())
